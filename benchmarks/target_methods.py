"""The optimizers of `steps_to_target`, by name: how each is built, and the ranges that its settings are drawn from.

The ranges are a factor of ten or more around the values that each method's authors or documentation name. They are the
same for all tasks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.target_search import Range, Space
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import (
    RECIPES,
    AdamWFallback,
    FixedInterval,
    KLClip,
    LevenbergMarquardt,
    MonteCarlo,
    QuadraticModel,
)

__all__ = ["DEFAULTS", "METHODS", "SEARCHED", "Method", "recipe_of"]

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """An optimizer of all of a model's parameters; `build` raises ImportError if a rival is not installed.

    space: the ranges that options are drawn from; empty for settings that are not searched.
    """

    build: Callable[[nn.Module, Options], torch.optim.Optimizer]
    space: Space
    is_ours: bool = False

    @property
    def has_schedule(self) -> bool:
        """Whether lr rises and falls over a run's steps; it doesn't where the optimizer chooses it or keeps its own."""
        return "lr" in self.space


# --- ours -------------------------------------------------------------------------------------------------------------

# Two recipes, each a method of its own.
OF_DAMPING = Range(0.003, 0.3)


def _ngd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Sampled statistics of a quarter of the batch, averaged, at every third step; a clip; an lr from the schedule.

    Parameters that no layer covers, as positions of a transformer, go by AdamW.
    """
    config = NGDConfig(
        fisher=MonteCarlo(),
        statistics_fraction=1 / 4,
        ema_decay=0.9,
        staleness=FixedInterval(steps=3),
        clip=KLClip(max_kl=0.01),
        fallback=AdamWFallback(lr=0.02),
        lr=options["lr"],
        damping=options["damping"],
    )
    return NGD(model, config)


def _ngd_adaptive(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Lr and momentum by the quadratic model, damping by Levenberg-Marquardt, statistics of a part of the batch."""
    config = NGDConfig(
        step_length=QuadraticModel(),
        damping_rule=LevenbergMarquardt(),
        fisher=MonteCarlo(),
        damping=options["damping"],
        statistics_fraction=min(1.0, options["fraction"]),
        staleness=FixedInterval(steps=max(1, round(options["interval"]))),
    )
    return NGD(model, config)


# --- rivals -----------------------------------------------------------------------------------------------------------


def _sgd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, **options)


def _adamw(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **options)


def _lamb(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lamb

    return Lamb(model.parameters(), **options)


def _soap(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), weight_decay=0.0, **options)


def _shampoo(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        model.parameters(), start_preconditioning_step=1, preconditioning_compute_steps=10, **options
    )


def _muon(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Hidden matrices by Muon; first layer, last layer and biases by AdamW at `adamw_lr`, as its author advises."""
    from pytorch_optimizer import Muon

    weights = [p for p in model.parameters() if p.ndim > 1]
    hidden = weights[1:-1]
    of_muon = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in of_muon]
    return Muon(
        [
            {"params": hidden, "use_muon": True, "lr": options["lr"]},
            {"params": rest, "use_muon": False, "lr": options["adamw_lr"]},
        ]
    )


# Settings that nobody searched for: those of `NGDConfig()`, and the recipe of each family of models.
DEFAULTS = "ngd-defaults"


def recipe_of(family: str) -> str:
    """Returns the name of the method that has the recipe of a family."""
    return f"ngd-{family}"


def _settled(config: NGDConfig) -> Method:
    return Method(lambda model, options: NGD(model, config), {}, is_ours=True)


METHODS: dict[str, Method] = {
    "ngd": Method(_ngd, {"lr": Range(0.01, 1.0), "damping": OF_DAMPING}, is_ours=True),
    "ngd-adaptive": Method(
        _ngd_adaptive,
        {"damping": OF_DAMPING, "fraction": Range(1 / 32, 1.0), "interval": Range(0.7, 10.0)},
        is_ours=True,
    ),
    "muon": Method(_muon, {"lr": Range(0.005, 0.2), "adamw_lr": Range(0.001, 0.05)}),
    "soap": Method(_soap, {"lr": Range(0.001, 0.05)}),
    "shampoo": Method(_shampoo, {"lr": Range(0.003, 0.3)}),
    "lamb": Method(_lamb, {"lr": Range(0.003, 0.2)}),
    "adamw": Method(_adamw, {"lr": Range(0.0005, 0.03)}),
    "sgd": Method(_sgd, {"lr": Range(0.01, 1.0)}),
    DEFAULTS: _settled(NGDConfig()),
    **{recipe_of(family): _settled(config) for family, config in RECIPES.items()},
}
SEARCHED = [name for name, method in METHODS.items() if method.space]

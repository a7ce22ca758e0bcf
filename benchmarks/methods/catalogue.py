"""The methods by name: how each is built, and the ranges that its settings are drawn from.

The ranges are a factor of ten or more around the values that each method's authors or documentation name. They are the
same for all tasks. All methods of this package share one frame: statistics of sampled labels, of a quarter of the batch
at every third step, averaged over time; a clip by KL; AdamW for parameters that no layer covers. SENG and Eva have
gradients of the loss in place of sampled ones, as their authors do; SNGD is SGD on a reconstructed network.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.methods.search import Range, Space
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import (
    EKFAC,
    KFAC,
    LNGD,
    RECIPES,
    SENG,
    SINGD,
    TKFAC,
    AdamWFallback,
    Empirical,
    Eva,
    FixedInterval,
    KLClip,
    LayerWise,
    LevenbergMarquardt,
    MonteCarlo,
    QuadraticModel,
    SNGDConfig,
)
from ngd_dist.transforms import SNGD
from ngd_workers.contract.spec import LAMB, LARS, SOAP, Muon, Plain, Shampoo

__all__ = ["DEFAULTS", "METHODS", "SEARCHED", "Method", "recipe_of"]

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """An optimizer of all of a model's parameters.

    space: the ranges that options are drawn from; empty for settings that are not searched. needs: a package without
    which it can't be built.
    """

    build: Callable[[nn.Module, Options], torch.optim.Optimizer]
    space: Space
    is_ours: bool = False
    needs: str = "torch"

    @property
    def has_schedule(self) -> bool:
        """Whether lr rises and falls over a run's steps; it doesn't where the optimizer chooses it or keeps its own."""
        return "lr" in self.space

    def is_here(self) -> bool:
        """Returns whether the package that it needs is installed."""
        return importlib.util.find_spec(self.needs) is not None


# --- ours -------------------------------------------------------------------------------------------------------------

LR, DAMPING = Range(0.01, 1.0), Range(0.003, 0.3)


def _ours(model: nn.Module, options: Options, **choices: Any) -> torch.optim.Optimizer:
    """Returns NGD in the frame of all methods, with these choices."""
    frame: dict[str, Any] = {
        "fisher": MonteCarlo(),
        "statistics_fraction": 1 / 4,
        "ema_decay": 0.9,
        "staleness": FixedInterval(steps=3),
        "clip": KLClip(max_kl=0.01),
        "fallback": AdamWFallback(lr=0.02),
        "lr": options["lr"],
    }
    damping = {"damping": options["damping"]} if "damping" in options else {}
    return NGD(model, NGDConfig(**(frame | damping | choices)))


def _adaptive(model: nn.Module, options: Options) -> torch.optim.Optimizer:
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


def _lngd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The method's own damping and layer-wise rate; its statistics read no labels."""
    return _ours(model, options, preconditioner=LNGD(), fisher=Empirical(), step_length=LayerWise(), clip=None)


class _Reconstructed(torch.optim.SGD):
    """SGD on the weights of a reconstructed network, which is made anew at every `T`-th step."""

    def __init__(self, model: nn.Module, lr: float, epsilon: float, T: int = 10) -> None:
        self._transform = SNGD(model, SNGDConfig(T=T, epsilon=epsilon))
        super().__init__(model.parameters(), lr=lr, momentum=0.9)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self._transform.step(self)


def _sngd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return _Reconstructed(model, options["lr"], options["epsilon"])


def _method(space: Space | None = None, **choices: Any) -> Method:
    return Method(partial(_ours, **choices), space or {"lr": LR, "damping": DAMPING}, is_ours=True)


# --- rivals -----------------------------------------------------------------------------------------------------------

LIBRARY = "pytorch_optimizer"


def _sgd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, **options)


def _adamw(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, **options)


def _as_in_a_job(kind: type[Plain], **ranges: Range) -> Method:
    """Returns an optimizer as a job has it, without weight decay, with its other defaults."""

    def build(model: nn.Module, options: Options) -> torch.optim.Optimizer:
        from ngd_workers.train import baselines

        return baselines.build(model, kind(weight_decay=0.0, **options))

    return Method(build, ranges, needs=LIBRARY)


# Settings that nobody searched for: those of `NGDConfig()`, and the recipe of each family of models.
DEFAULTS = "ngd-defaults"


def recipe_of(family: str) -> str:
    """Returns the name of the method that has the recipe of a family."""
    return f"ngd-{family}"


def _settled(config: NGDConfig) -> Method:
    return Method(lambda model, options: NGD(model, config), {}, is_ours=True)


METHODS: dict[str, Method] = {
    "kfac": _method(preconditioner=KFAC()),
    "kfac-adaptive": Method(
        _adaptive, {"damping": DAMPING, "fraction": Range(1 / 32, 1.0), "interval": Range(0.7, 10.0)}, is_ours=True
    ),
    "ekfac": _method(preconditioner=EKFAC()),
    "lngd": Method(_lngd, {"lr": Range(0.0003, 0.3)}, is_ours=True),
    "tkfac": _method(preconditioner=TKFAC()),
    "seng": _method({"lr": LR, "damping": Range(0.02, 2.0)}, preconditioner=SENG(), fisher=Empirical(), ema_decay=0.0),
    "sngd": Method(_sngd, {"lr": LR, "epsilon": Range(0.01, 1.0)}, is_ours=True),
    "eva": _method(preconditioner=Eva(), fisher=Empirical()),
    "singd": _method(preconditioner=SINGD()),
    "singd-diagonal": _method(preconditioner=SINGD(structure="diagonal")),
    "muon": _as_in_a_job(Muon, lr=Range(0.005, 0.2), adamw_lr=Range(0.001, 0.05)),
    "soap": _as_in_a_job(SOAP, lr=Range(0.001, 0.05)),
    "shampoo": _as_in_a_job(Shampoo, lr=Range(0.003, 0.3)),
    "lamb": _as_in_a_job(LAMB, lr=Range(0.003, 0.2)),
    "lars": _as_in_a_job(LARS, lr=Range(0.1, 30.0)),
    "adamw": Method(_adamw, {"lr": Range(0.0005, 0.03)}),
    "sgd": Method(_sgd, {"lr": Range(0.01, 1.0)}),
    DEFAULTS: _settled(NGDConfig()),
    **{recipe_of(family): _settled(config) for family, config in RECIPES.items()},
}
SEARCHED = [name for name, method in METHODS.items() if method.space]

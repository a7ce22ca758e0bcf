"""The optimizers of `steps_to_target`, by name, and the settings that each gets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ngd_dist import NGD, NGDConfig

__all__ = ["BUILDERS", "FIRST_ORDER", "Setting", "build"]

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """A method's options, and the length of its run: lr rises over `warmup` steps and falls linearly to 0 at `steps`.

    If the options have no lr, the method chooses it at each step, and only the length counts.
    """

    steps: int
    warmup: int
    options: dict[str, Any] = field(default_factory=dict)

    def lr_factor(self, step: int) -> float:
        """Returns the factor on lr at `step`, which counts from 1."""
        return min(1.0, step / self.warmup if self.warmup else 1.0) * (1 - (step - 1) / self.steps)

    def __str__(self) -> str:
        shown = [f"{name} {_shown(value)}" for name, value in self.options.items()]
        return ", ".join([*shown, f"{self.steps} steps", f"{self.warmup} warm-up"])


def build(method: str, model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Returns the optimizer of all of the model's parameters. Raises: ImportError if the rival is not installed."""
    return BUILDERS[method](model, options)


def _ngd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return NGD(model, NGDConfig.model_validate(options))


def _sgd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, **options)


def _adamw(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"weight_decay": 0.0} | dict(options))


def _lamb(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lamb

    return Lamb(model.parameters(), **options)


def _soap(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), **{"weight_decay": 0.0} | dict(options))


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


def _singd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    from singd.optim.optimizer import SINGD

    return SINGD(model, **options)


BUILDERS: dict[str, Callable[[nn.Module, Options], torch.optim.Optimizer]] = {
    "ngd": _ngd,
    "sgd": _sgd,
    "adamw": _adamw,
    "lamb": _lamb,
    "muon": _muon,
    "soap": _soap,
    "singd": _singd,
}
FIRST_ORDER = ("sgd", "adamw", "lamb")


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:g}" if isinstance(value, float) else str(value)
    rest = ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items() if name != "kind")
    return str(value.get("kind", "")) + (f" ({rest})" if rest else "")

"""The checks, growth and copies of param groups."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ngd_dist.config import NGDConfig, QuadraticModel
from ngd_dist.errors import ConfigError

__all__ = ["Uncopied", "check_group", "take_in"]


@dataclass(frozen=True, slots=True)
class Uncopied:
    """The process group in a copy of an optimizer: the same object, which can't go to another process."""

    value: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "Uncopied":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.value is not None:
            raise ConfigError(
                "an NGD with a process_group can't be pickled: save its state_dict(), and build a new one where it goes"
            )
        return Uncopied, (None,)


def take_in(group: Mapping[str, Any], parameters: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Puts parameters of the model into the group, in the model's order.

    So a state that is saved then fits an optimizer that is built after all of them are unfrozen.
    """
    order = {p: index for index, p in enumerate(model.parameters())}
    group["params"].extend(parameters)
    group["params"].sort(key=lambda p: order.get(p, len(order)))


def check_group(group: Mapping[str, Any], index: int, config: NGDConfig) -> None:
    """Returns if the group's settings are in bounds. Raises: ConfigError with the value, the bound and the group."""
    bounds = {
        "lr": (group["lr"] >= 0, ">= 0"),
        "momentum": (0 <= group["momentum"] < 1, ">= 0 and < 1"),
        "weight_decay": (group["weight_decay"] >= 0, ">= 0"),
        "damping": (group["damping"] > 0, "> 0"),
    }
    for name, (is_valid, bound) in bounds.items():
        if not is_valid:
            raise ConfigError(f"{name} must be {bound}, got {group[name]} in param group {index}")
    if isinstance(config.length, QuadraticModel) and group["weight_decay"] > 0:
        raise ConfigError(
            f"weight_decay must be 0 under step_length quadratic_model, which predicts the whole step, got "
            f"{group['weight_decay']} in param group {index}"
        )

"""What a param group may hold."""

from collections.abc import Mapping
from typing import Any

from ngd_dist.config import NGDConfig, QuadraticModel
from ngd_dist.errors import ConfigError

__all__ = ["check_group"]


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

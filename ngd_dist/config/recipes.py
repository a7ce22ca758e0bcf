"""Settings for five families of models, that reached the targets of `benchmarks/families.py` untuned."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from ngd_dist.config.damping import LevenbergMarquardt
from ngd_dist.config.fisher import MonteCarlo
from ngd_dist.config.ngd import NGDConfig
from ngd_dist.config.step import AdamWFallback, KLClip, QuadraticModel

__all__ = ["RECIPES", "Family"]

Family = Literal["mlp", "cnn", "vit", "gpt", "lstm"]


def _adaptive(damping: float, fraction: float) -> NGDConfig:
    return NGDConfig(
        step_length=QuadraticModel(),
        damping_rule=LevenbergMarquardt(),
        fisher=MonteCarlo(),
        damping=damping,
        statistics_fraction=fraction,
    )


RECIPES: Mapping[Family, NGDConfig] = MappingProxyType(
    {
        "mlp": NGDConfig(damping=0.03, clip=KLClip(max_kl=0.01)),
        "cnn": _adaptive(0.03, 1 / 8),
        "vit": _adaptive(0.1, 1 / 2),
        "gpt": _adaptive(0.1, 1 / 8),
        "lstm": NGDConfig(fallback=AdamWFallback(lr=0.003)),
    }
)

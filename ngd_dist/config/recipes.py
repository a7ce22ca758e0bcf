"""Settings for five families of models, for `benchmarks/families.py` to measure as they stand.

Those with a quadratic model need `step(objective=...)`, and those with a sampled Fisher `fisher_backward(output)`.

>>> from ngd_dist.config import RECIPES
>>> RECIPES["cnn"].needs_objective
True
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from ngd_dist.config.damping import LevenbergMarquardt
from ngd_dist.config.fisher import MonteCarlo
from ngd_dist.config.ngd import NGDConfig
from ngd_dist.config.staleness import FixedInterval
from ngd_dist.config.step import KLClip, QuadraticModel

__all__ = ["RECIPES", "Family"]

Family = Literal["mlp", "cnn", "vit", "gpt", "lstm"]


_OF_SEQUENCES = NGDConfig(
    fisher=MonteCarlo(),
    statistics_fraction=1 / 4,
    ema_decay=0.9,
    staleness=FixedInterval(steps=3),
    lr=0.03,
    damping=0.03,
    clip=KLClip(max_kl=0.01),
)
RECIPES: Mapping[Family, NGDConfig] = MappingProxyType(
    {
        "mlp": NGDConfig(lr=0.1, damping=0.03, clip=KLClip(max_kl=0.01)),
        "cnn": NGDConfig(
            step_length=QuadraticModel(),
            damping_rule=LevenbergMarquardt(),
            fisher=MonteCarlo(),
            damping=0.03,
            statistics_fraction=1 / 8,
        ),
        "vit": _OF_SEQUENCES,
        "gpt": _OF_SEQUENCES,
        # At 0.03 the LSTM of `benchmarks.methods.tasks` needs 180 steps to its target, at 0.003 80, at 0.001 60.
        "lstm": _OF_SEQUENCES.model_copy(update={"damping": 0.001}),
    }
)

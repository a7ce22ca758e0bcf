"""Lambda at each step."""

import math
from collections.abc import Mapping
from typing import Any

from ngd_dist.config import ConstantDamping, DampingChoice, ExponentialDamping, LevenbergMarquardt, PolynomialDamping

__all__ = ["damping_after", "levenberg_marquardt", "reduction_ratio", "scheduled"]


def scheduled(rule: ConstantDamping | ExponentialDamping | PolynomialDamping, initial: float, step: int) -> float:
    """Returns lambda after `step` steps of a run that began with `initial`: a function of the two alone."""
    if isinstance(rule, ExponentialDamping):
        return max(initial * math.pow(rule.factor, step / rule.every), rule.minimum)
    if isinstance(rule, PolynomialDamping):
        left = max(0.0, 1 - step / rule.steps)
        return rule.end + (initial - rule.end) * math.pow(left, rule.power)
    return initial


def damping_after(rule: DampingChoice, group: Mapping[str, Any], step: int) -> float:
    """Returns a param group's lambda after `step` steps: scheduled, or as it was last set."""
    if isinstance(rule, ConstantDamping | LevenbergMarquardt):
        return float(group["damping"])
    return scheduled(rule, group["first_damping"], step)


def reduction_ratio(loss_change: float, model_change: float) -> float:
    """Returns rho = loss_change / model_change, both after minus before; NaN unless the model predicted a decrease.

    Without that guard, if both model and loss rise in a step, the step would have a good rho.
    Source: [MG15] section 6.5.
    """
    return loss_change / model_change if model_change < 0 else math.nan


def levenberg_marquardt(rule: LevenbergMarquardt, damping: float, rho: float) -> float:
    """Returns lambda for the next `rule.every` steps: smaller if the model was right, larger if it was wrong.

    rho: of `reduction_ratio`. NaN counts as wrong. Source: [MG15] section 6.5.
    """
    factor = rule.decay**rule.every
    if math.isnan(rho) or rho < rule.low:
        damping /= factor
    elif rho > rule.high:
        damping *= factor
    return min(max(damping, rule.minimum), rule.maximum)

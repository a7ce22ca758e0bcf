"""How large lambda is at a step, and how it is shared between the two factors of a layer."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ngd_dist.config import ConstantDamping, DampingChoice, ExponentialDamping, LevenbergMarquardt, PolynomialDamping

__all__ = ["damping_after", "levenberg_marquardt", "pi_split", "reduction_ratio", "scheduled"]


def pi_split(mean_a: Tensor, mean_g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the multiples of I to add to A and to G: pi sqrt(lambda) and sqrt(lambda) / pi, both [B].

    mean_a, mean_g: [B], the mean of each factor's diagonal, tr A / dim A and tr G / dim G.

    pi = sqrt(mean_a / mean_g): with it the damped product is closest to A (x) G + lambda I in trace norm. pi is 1 in a
    block where a mean is 0, negative or not finite, so that a dead layer still gets an invertible factor.
    Source: [MG15] section 6.3, trace norm.
    """
    ratio = mean_a / mean_g
    is_alive = (mean_a > 0) & (ratio > 0) & torch.isfinite(ratio)
    pi = torch.where(is_alive, ratio, torch.ones_like(ratio)).sqrt()
    root = damping**0.5
    return pi * root, root / pi


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

    Without that guard a step that both the model and the loss call a bad one would have a good rho.
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

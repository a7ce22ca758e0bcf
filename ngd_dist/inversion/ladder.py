"""The order in which methods are tried on a dense factor: pure functions of a few numbers.

Newton-Schulz from the inverse in use is the cheapest if that is close; from a multiple of I it costs some
log2(condition number) iterations more; Cholesky takes the other factors, in float64 last.
"""

from dataclasses import dataclass
from math import ceil, inf, log, log2

from ngd_dist.inversion.problem import MAX_RESIDUAL, Ending, Method

__all__ = ["Conditioning", "Policy", "Try", "after", "cold_iterations", "ending_of", "first", "warm_iterations"]

# Spectral radius of I - X old above which `old` is no start: its estimate is some per cent too low, and from 1 on
# the iteration diverges.
MAX_RHO = 0.9
# Condition numbers up to which the iteration is run from a multiple of I, by the update's dtype. Seen to converge and
# to diverge: float16 at 1e5 and 1e6, bfloat16 at 1e4 (slowly) and 3e4. In float32 1e6 leaves a residual of 0.01.
MAX_KAPPA = {"float16": 1e5, "bfloat16": 5e3, "float32": 1e6}


@dataclass(frozen=True, slots=True)
class Policy:
    """The methods for a factor: Newton-Schulz for at most `max_iterations` (0: not at all), then those of `direct`."""

    direct: tuple[Method, ...] = (Method.CHOLESKY, Method.CHOLESKY_FLOAT64)
    max_iterations: int = 0
    update_dtype: str = "float16"
    residual: str = "float32"
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True)
class Conditioning:
    """kappa: a bound on the condition number. rho: the spectral radius of I - X old; infinite if there is no old.

    Both are infinite unless they were estimated.
    """

    kappa: float = inf
    rho: float = inf


@dataclass(frozen=True, slots=True)
class Try:
    """A method, and for Newton-Schulz the iterations that it is expected to take."""

    method: Method
    iterations: int = 0


def first(policy: Policy, conditioning: Conditioning) -> Try:
    """Returns the first try."""
    next_try = _next(policy, conditioning, Method.RECIPROCAL)
    assert next_try is not None  # a Cholesky inverse at least
    return next_try


def after(policy: Policy, conditioning: Conditioning, tried: Method, ending: Ending) -> Try | None:
    """Returns the try after a method that ended so; None if nothing more is tried."""
    if ending in (Ending.OK, Ending.NON_FINITE):
        return None
    return _next(policy, conditioning, tried)


def ending_of(method: Method, *, is_finite: bool, is_definite: bool, residual: float) -> Ending:
    """Returns the ending of an inversion from the checks of its matrix and the residual of its inverse."""
    if not is_finite:
        return Ending.NON_FINITE
    if not is_definite:
        return Ending.NOT_POSITIVE_DEFINITE
    if residual <= MAX_RESIDUAL:
        return Ending.OK
    is_iterative = method in (Method.WARM_NEWTON_SCHULZ, Method.NEWTON_SCHULZ)
    return Ending.NOT_CONVERGED if is_iterative else Ending.INACCURATE


def warm_iterations(rho: float, tolerance: float) -> int:
    """Returns the iterations after which a residual of spectral radius rho < 1 is below the tolerance.

    An iteration squares the residual.
    """
    return 1 if rho <= tolerance else max(1, ceil(log2(log(tolerance) / log(rho))))


def cold_iterations(kappa: float, tolerance: float) -> int:
    """Returns the iterations from 2 / (smallest + largest eigenvalue) * I, where rho is (kappa - 1) / (kappa + 1)."""
    return warm_iterations((kappa - 1) / (kappa + 1), tolerance)


def _next(policy: Policy, conditioning: Conditioning, tried: Method) -> Try | None:
    if tried < Method.WARM_NEWTON_SCHULZ and conditioning.rho < MAX_RHO:
        iterations = warm_iterations(conditioning.rho, policy.tolerance)
        if iterations <= policy.max_iterations:
            return Try(Method.WARM_NEWTON_SCHULZ, iterations)
    if tried < Method.NEWTON_SCHULZ and conditioning.kappa <= MAX_KAPPA[policy.update_dtype]:
        iterations = cold_iterations(conditioning.kappa, policy.tolerance)
        if iterations <= policy.max_iterations:
            return Try(Method.NEWTON_SCHULZ, iterations)
    return next((Try(method) for method in policy.direct if method > tried), None)

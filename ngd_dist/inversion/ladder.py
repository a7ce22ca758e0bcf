"""Which method is tried on a dense factor, and which after it: pure functions of a few numbers.

Newton-Schulz from the inverse in use is the cheapest where that is close; from a multiple of I it costs some
log2(condition number) iterations more; Cholesky takes what is left, in float64 last.
"""

from dataclasses import dataclass
from math import ceil, inf, log, log2

from ngd_dist.inversion.problem import MAX_RESIDUAL, Ending, Method

__all__ = ["Attempt", "Estimate", "Terms", "after", "cold_iterations", "ending_of", "first", "warm_iterations"]

# Spectral radius of I - X old above which `old` is no start: the estimate of it is some per cent short, and from 1 on
# the iteration diverges.
MAX_RHO = 0.9
# Condition numbers up to which the iteration is run from a multiple of I, by the update's dtype. Seen to converge and
# to diverge: float16 at 1e5 and 1e6, bfloat16 at 1e4 (slowly) and 3e4. In float32 1e6 leaves a residual of 0.01.
MAX_KAPPA = {"float16": 1e5, "bfloat16": 5e3, "float32": 1e6}


@dataclass(frozen=True, slots=True)
class Terms:
    """What may be tried on a factor: Newton-Schulz for at most so many iterations (0: not at all), then `direct`."""

    direct: tuple[Method, ...] = (Method.CHOLESKY, Method.CHOLESKY_FLOAT64)
    max_iterations: int = 0
    update_dtype: str = "float16"
    residual: str = "float32"
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True)
class Estimate:
    """kappa: a bound on the condition number. rho: the spectral radius of I - X old; infinite where there is no old.

    Both infinite unless somebody looked.
    """

    kappa: float = inf
    rho: float = inf


@dataclass(frozen=True, slots=True)
class Attempt:
    """A method, and for Newton-Schulz the iterations that it is expected to take."""

    method: Method
    iterations: int = 0


def first(terms: Terms, estimate: Estimate) -> Attempt:
    """Returns what is tried first."""
    found = _next(terms, estimate, Method.RECIPROCAL)
    assert found is not None  # a Cholesky inverse at least
    return found


def after(terms: Terms, estimate: Estimate, tried: Method, ending: Ending) -> Attempt | None:
    """Returns what is tried after a method that ended so; None where that is the end of it."""
    if ending in (Ending.OK, Ending.NON_FINITE):
        return None
    return _next(terms, estimate, tried)


def ending_of(method: Method, *, is_finite: bool, is_definite: bool, residual: float) -> Ending:
    """Returns how an inversion ended, from whether its matrix was finite and definite, and the inverse's residual."""
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
    """Returns those from 2 / (smallest + largest eigenvalue) * I, where rho is (kappa - 1) / (kappa + 1)."""
    return warm_iterations((kappa - 1) / (kappa + 1), tolerance)


def _next(terms: Terms, estimate: Estimate, tried: Method) -> Attempt | None:
    if tried < Method.WARM_NEWTON_SCHULZ and estimate.rho < MAX_RHO:
        iterations = warm_iterations(estimate.rho, terms.tolerance)
        if iterations <= terms.max_iterations:
            return Attempt(Method.WARM_NEWTON_SCHULZ, iterations)
    if tried < Method.NEWTON_SCHULZ and estimate.kappa <= MAX_KAPPA[terms.update_dtype]:
        iterations = cold_iterations(estimate.kappa, terms.tolerance)
        if iterations <= terms.max_iterations:
            return Attempt(Method.NEWTON_SCHULZ, iterations)
    return next((Attempt(method) for method in terms.direct if method > tried), None)

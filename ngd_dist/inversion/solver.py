"""All of a step's inversions: factors of one size are inverted by one call, and what fails is tried another way."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.config import AutomaticInversion, InversionChoice
from ngd_dist.inversion.crossover import terms_for
from ngd_dist.inversion.direct import cholesky, damped, eigen, judged
from ngd_dist.inversion.ladder import Attempt, Estimate, Terms, after, first
from ngd_dist.inversion.newton_schulz import bounds, equilibrated, newton_schulz, spectral_radius
from ngd_dist.inversion.problem import (
    Eigen,
    Ending,
    Found,
    Inverse,
    Method,
    Problem,
    Solution,
    ToDecompose,
    ToInvert,
)

__all__ = ["solve"]

# Of one batch: 256 MiB in float32. A factor is never divided.
MAX_ENTRIES = 2**26
AUTOMATIC = AutomaticInversion()

Name = TypeVar("Name", bound=Hashable)


@dataclass(slots=True)
class _Case:
    """One factor on its way. `inverse` is what the last attempt gave."""

    problem: ToInvert
    terms: Terms
    estimate: Estimate
    attempt: Attempt | None
    inverse: Inverse | None = None

    @property
    def factor(self) -> Tensor:
        return self.problem.factor

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What cases that one call can take have in common."""
        return self.problem.direct, *_kind(self.factor)


def solve(problems: Mapping[Name, Problem], choice: InversionChoice = AUTOMATIC) -> dict[Name, Solution]:
    """Returns the solution of each problem, batched by size, dtype and device.

    Everything is queued before anything is read: the host waits once for each rung of the ladder that some factor
    takes, and once more to look at what Newton-Schulz may be tried on.
    """
    with _exact_products():
        inverted = _invert_all({n: p for n, p in problems.items() if not isinstance(p, ToDecompose)}, choice)
        decomposed = _decompose_all({n: p for n, p in problems.items() if isinstance(p, ToDecompose)})
    return {name: inverted[name] if name in inverted else decomposed[name] for name in problems}


def _invert_all(problems: Mapping[Name, ToInvert], choice: InversionChoice) -> dict[Name, Inverse]:
    cases = dict(zip(problems, _cases(list(problems.values()), choice), strict=True))
    waiting = list(cases.values())
    while waiting:
        queued = [(batch, _run(batch)) for batch in _batches(waiting)]
        for batch, (values, outcomes) in queued:
            _take(batch, values, outcomes.tolist())
        waiting = [case for case in waiting if case.attempt is not None]
    return {name: case.inverse for name, case in cases.items() if case.inverse is not None}


def _cases(problems: Sequence[ToInvert], choice: InversionChoice) -> list[_Case]:
    """Returns what each factor's first attempt is, having looked at those that Newton-Schulz may be tried on."""
    cases = [
        _Case(problem, Terms(direct=()), Estimate(), Attempt(problem.direct.method) if problem.direct else None)
        for problem in problems
    ]
    dense = [case for case in cases if case.attempt is None]
    blocks: dict[Hashable, int] = defaultdict(int)
    for case in dense:
        blocks[case.kind] += len(case.factor)
    for case in dense:
        factor = case.factor
        case.terms = terms_for(choice, factor.shape[-1], blocks[case.kind], factor.dtype, factor.device)
    looked = [(case, _look(case)) for case in dense if case.terms.max_iterations > 0]
    for case, (kappa, rho) in looked:
        case.estimate = Estimate(float(kappa), float(rho))
    for case in dense:
        case.attempt = first(case.terms, case.estimate)
    return cases


def _look(case: _Case) -> tuple[Tensor, Tensor]:
    """Returns the largest condition number of the blocks, and the largest spectral radius of I - X old. O(n^2)."""
    matrix = damped(case.factor, case.problem.damping)
    kappa = bounds(*equilibrated(matrix), case.problem.damping).kappa.amax()
    if case.problem.old is None:
        return kappa, torch.full_like(kappa, torch.inf)
    return kappa, spectral_radius(matrix, case.problem.old.to(matrix.dtype)).amax()


def _batches(cases: Sequence[_Case]) -> Iterator[list[_Case]]:
    """Yields the cases that one call can take: of one size, dtype, device and next method."""
    alike: dict[Hashable, list[_Case]] = defaultdict(list)
    for case in cases:
        assert case.attempt is not None
        alike[(*case.kind, case.attempt.method)].append(case)
    for group in alike.values():
        batch: list[_Case] = []
        for case in group:
            if batch and sum(other.factor.numel() for other in [*batch, case]) > MAX_ENTRIES:
                yield batch
                batch = []
            batch.append(case)
        yield batch


def _run(batch: Sequence[_Case]) -> Found:
    """Returns what the batch's method gives, of all blocks of all its cases; nothing is read back."""
    damping = torch.cat([case.problem.damping for case in batch])
    factor = torch.cat([case.factor for case in batch])
    attempts = [case.attempt for case in batch if case.attempt is not None]
    method, terms = attempts[0].method, batch[0].terms
    if batch[0].problem.direct:
        return batch[0].problem.direct.inverse(factor, damping)
    if method is Method.CHOLESKY_FLOAT64:
        factor, damping = factor.double(), damping.double()
    factor.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    if method in (Method.CHOLESKY, Method.CHOLESKY_FLOAT64):
        return cholesky(factor, batch[0].factor.dtype)
    olds = [case.problem.old for case in batch if case.problem.old is not None]
    return newton_schulz(
        factor,
        damping,
        torch.cat(olds) if method is Method.WARM_NEWTON_SCHULZ else None,
        _iterations(batch),
        update_dtype=getattr(torch, terms.update_dtype),
        residual=terms.residual,
    )


def _iterations(batch: Sequence[_Case]) -> int:
    """Returns the most that a case of the batch needs: more than needed do no harm."""
    return max(case.attempt.iterations for case in batch if case.attempt is not None)


def _take(batch: Sequence[_Case], values: Tensor, outcomes: list[list[float]]) -> None:
    """Hands each case its own inverse, and decides what is tried on it next."""
    begin, iterations = 0, _iterations(batch)
    for case in batch:
        assert case.attempt is not None
        end = begin + len(case.factor)
        # Of its own storage: a view would keep the whole batch alive for as long as this one inverse is in use.
        value = values[begin:end].clone() if len(batch) > 1 else values
        method = case.attempt.method
        case.inverse = judged(method, value, outcomes[begin:end], iterations)
        case.attempt = after(case.terms, case.estimate, method, case.inverse.ending)
        begin = end


def _decompose_all(problems: Mapping[Name, ToDecompose]) -> dict[Name, Eigen]:
    alike: dict[Hashable, list[Name]] = defaultdict(list)
    for name, problem in problems.items():
        alike[_kind(problem.factor)].append(name)
    found: dict[Name, Eigen] = {}
    for names in alike.values():
        factors = [problems[name].factor for name in names]
        whole = eigen(torch.cat(factors)) if len(names) > 1 else None
        if whole is None or whole.values is None or whole.vectors is None:
            found |= {name: eigen(factor) for name, factor in zip(names, factors, strict=True)}
            continue
        sizes = [len(factor) for factor in factors]
        parts = zip(whole.values.split(sizes), whole.vectors.split(sizes), strict=True)
        found |= {n: Eigen(v.clone(), u.clone(), Ending.OK) for n, (v, u) in zip(names, parts, strict=True)}
    return found


def _kind(factor: Tensor) -> tuple[Hashable, ...]:
    return factor.shape[1:], factor.dtype, factor.device


@contextmanager
def _exact_products() -> Iterator[None]:
    """Has float32 products computed in float32, whatever the user allows: with TF32 no residual would be accurate."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision

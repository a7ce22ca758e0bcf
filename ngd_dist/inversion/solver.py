"""All inversions of a step: one call inverts the factors of one size, and failed ones are tried another way."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.config import AutomaticInversion, InversionChoice
from ngd_dist.inversion.crossover import policy_for
from ngd_dist.inversion.direct import cholesky, damped, eigen, judged
from ngd_dist.inversion.ladder import Conditioning, Policy, Try, after, first
from ngd_dist.inversion.newton_schulz import bounds, equilibrated, newton_schulz, spectral_radius
from ngd_dist.inversion.problem import (
    Eigen,
    Ending,
    Inverse,
    Method,
    Problem,
    RawInverse,
    Solution,
    ToDecompose,
    ToInvert,
)

__all__ = ["exact_products", "solve"]

# The entries of one batch: 256 MiB in float32 on a GPU, 1 MiB on a CPU, where a batch that no cache holds takes longer
# than its factors by themselves. A factor is never divided.
MAX_ENTRIES, MAX_ENTRIES_CPU = 2**26, 2**18
AUTOMATIC = AutomaticInversion()
NOTHING, UNKNOWN = Policy(direct=()), Conditioning()

Name = TypeVar("Name", bound=Hashable)


@dataclass(slots=True)
class _Task:
    """One factor to invert. `next_try`: None once nothing is left to try. `inverse`: the result of the last try."""

    problem: ToInvert
    kind: tuple[Hashable, ...]  # in common if one call can take the tasks
    policy: Policy = NOTHING
    conditioning: Conditioning = UNKNOWN
    next_try: Try | None = None
    inverse: Inverse | None = None

    @property
    def factor(self) -> Tensor:
        return self.problem.factor


def solve(problems: Mapping[Name, Problem], choice: InversionChoice = AUTOMATIC) -> dict[Name, Solution]:
    """Returns the solution of each problem, batched by size, dtype and device.

    Everything is queued before anything is read: the host waits once for each rung of the ladder that some factor
    takes, and once more if Newton-Schulz may be tried.
    """
    with exact_products():
        inverted = _invert_all({n: p for n, p in problems.items() if not isinstance(p, ToDecompose)}, choice)
        decomposed = _decompose_all({n: p for n, p in problems.items() if isinstance(p, ToDecompose)})
    return {name: inverted[name] if name in inverted else decomposed[name] for name in problems}


def _invert_all(problems: Mapping[Name, ToInvert], choice: InversionChoice) -> dict[Name, Inverse]:
    tasks = dict(zip(problems, _tasks(list(problems.values()), choice), strict=True))
    waiting = list(tasks.values())
    while waiting:
        queued = [(batch, _run(batch)) for batch in _batches(waiting)]
        for batch, (values, outcomes) in queued:
            _take(batch, values, outcomes.tolist())
        waiting = [task for task in waiting if task.next_try is not None]
    return {name: task.inverse for name, task in tasks.items() if task.inverse is not None}


def _tasks(problems: Sequence[ToInvert], choice: InversionChoice) -> list[_Task]:
    """Returns a task for each factor with its first try, after a look at those that Newton-Schulz may be tried on."""
    tasks = [_Task(problem, (problem.direct, *_kind(problem.factor))) for problem in problems]
    alike: dict[Hashable, list[_Task]] = defaultdict(list)
    for task in tasks:
        if task.problem.direct is None:
            alike[task.kind].append(task)
        else:
            task.next_try = Try(task.problem.direct.method)
    for of_kind in alike.values():
        factor, blocks = of_kind[0].factor, sum(task.factor.shape[0] for task in of_kind)
        policy = policy_for(choice, factor.shape[-1], blocks, factor.dtype, factor.device)
        for task in of_kind:
            task.policy = policy
    dense = [task for of_kind in alike.values() for task in of_kind]
    looked = [(task, _look(task)) for task in dense if task.policy.max_iterations > 0]
    for task, (kappa, rho) in looked:
        task.conditioning = Conditioning(float(kappa), float(rho))
    for task in dense:
        task.next_try = first(task.policy, task.conditioning)
    return tasks


def _look(task: _Task) -> tuple[Tensor, Tensor]:
    """Returns the largest condition number of the blocks, and the largest spectral radius of I - X old. O(n^2)."""
    matrix = damped(task.factor, task.problem.damping)
    kappa = bounds(*equilibrated(matrix), task.problem.damping).kappa.amax()
    if task.problem.old is None:
        return kappa, torch.full_like(kappa, torch.inf)
    return kappa, spectral_radius(matrix, task.problem.old.to(matrix.dtype)).amax()


def _batches(tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
    """Yields the tasks that one call can take: of one size, dtype, device and next method."""
    alike: dict[Hashable, list[_Task]] = defaultdict(list)
    for task in tasks:
        assert task.next_try is not None
        alike[(*task.kind, task.next_try.method)].append(task)
    for group in alike.values():
        batch: list[_Task] = []
        entries, limit = 0, MAX_ENTRIES_CPU if group[0].factor.device.type == "cpu" else MAX_ENTRIES
        for task in group:
            entries += task.factor.numel()
            if batch and entries > limit:
                yield batch
                batch, entries = [], task.factor.numel()
            batch.append(task)
        yield batch


def _run(batch: Sequence[_Task]) -> RawInverse:
    """Returns the results of the batch's method for all blocks of its tasks; nothing is read back."""
    damping = torch.cat([task.problem.damping for task in batch])
    factor = torch.cat([task.factor for task in batch])
    tries = [task.next_try for task in batch if task.next_try is not None]
    method, policy = tries[0].method, batch[0].policy
    if batch[0].problem.direct:
        return batch[0].problem.direct.inverse(factor, damping)
    if method is Method.CHOLESKY_FLOAT64:
        factor, damping = factor.double(), damping.double()
    factor.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    if method in (Method.CHOLESKY, Method.CHOLESKY_FLOAT64):
        return cholesky(factor, batch[0].factor.dtype)
    olds = [task.problem.old for task in batch if task.problem.old is not None]
    return newton_schulz(
        factor,
        damping,
        torch.cat(olds) if method is Method.WARM_NEWTON_SCHULZ else None,
        _iterations(batch),
        update_dtype=getattr(torch, policy.update_dtype),
        residual=policy.residual,
    )


def _iterations(batch: Sequence[_Task]) -> int:
    """Returns the most iterations that a task of the batch needs: more than needed do no harm."""
    return max(task.next_try.iterations for task in batch if task.next_try is not None)


def _take(batch: Sequence[_Task], values: Tensor, outcomes: list[list[float]]) -> None:
    """Hands each task its inverse, and decides its next try."""
    begin, iterations = 0, _iterations(batch)
    for task in batch:
        assert task.next_try is not None
        end = begin + len(task.factor)
        # A copy: a view would keep the whole batch alive for as long as this one inverse is in use.
        value = values[begin:end].clone() if len(batch) > 1 else values
        method = task.next_try.method
        task.inverse = judged(method, value, outcomes[begin:end], iterations)
        task.next_try = after(task.policy, task.conditioning, method, task.inverse.ending)
        begin = end


def _decompose_all(problems: Mapping[Name, ToDecompose]) -> dict[Name, Eigen]:
    alike: dict[Hashable, list[Name]] = defaultdict(list)
    for name, problem in problems.items():
        alike[_kind(problem.factor)].append(name)
    solutions: dict[Name, Eigen] = {}
    for names in alike.values():
        factors = [problems[name].factor for name in names]
        whole = eigen(torch.cat(factors)) if len(names) > 1 else None
        if whole is None or whole.values is None or whole.vectors is None:
            solutions |= {name: eigen(factor) for name, factor in zip(names, factors, strict=True)}
            continue
        sizes = [len(factor) for factor in factors]
        pairs = zip(whole.values.split(sizes), whole.vectors.split(sizes), strict=True)
        solutions |= {n: Eigen(v.clone(), u.clone(), Ending.OK) for n, (v, u) in zip(names, pairs, strict=True)}
    return solutions


def _kind(factor: Tensor) -> tuple[Hashable, ...]:
    return factor.shape[1:], factor.dtype, factor.device


@contextmanager
def exact_products() -> Iterator[None]:
    """Computes float32 products in float32 even if the user allows TF32: no residual would be accurate."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision

"""The spectra of factors on their device: those that refreshes have made, and whose turn it is to be estimated."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ngd_dist.factors.form import FactorForm
from ngd_dist.inversion import Method, Problem, Solution
from ngd_dist.inversion.lanczos import tridiagonal
from ngd_dist.inversion.spectrum import damping_of, eigenvalues, quantiles
from ngd_dist.statistics.statistic import Key, StatisticSpec

__all__ = ["MOST", "Estimate", "Spectra"]

MOST = 2  # estimates of a watched step, so that its cost does not grow with the model


class Estimate(NamedTuple):
    """The turn of a statistic. width: of all its blocks. told: of `tridiagonal`; None if this rank has nothing."""

    key: Key
    width: int
    told: Tensor | None


class Spectra:
    """Every rank makes the same calls but `note`, so that all agree on whose turn it is.

    exact: of each factor whose refresh here has made eigenvalues: 1, quantiles and damping, [7].
    """

    def __init__(self, specs: Mapping[Key, StatisticSpec]) -> None:
        self.exact: dict[Key, Tensor] = {}
        self._widths = {
            key: spec.form.shape[0] * spec.form.shape[-1]
            for key, spec in specs.items()
            if isinstance(spec.form, FactorForm) and not _is_diagonal(spec.form)
        }
        self._waiting = dict.fromkeys(self._widths)  # in order of their turns

    def note(
        self, problems: Mapping[Key, Problem], solutions: Mapping[Key, Solution], damping: Callable[[Key], float]
    ) -> None:
        """Notes the eigenvalues that these solutions have. damping: returns that of a statistic's layer."""
        made = {key: values for key in problems if (values := eigenvalues(problems[key], solutions[key])) is not None}
        for key, values in made.items():
            others = next((v for other, v in made.items() if other.layer == key.layer and other != key), None)
            own = damping_of(problems[key], damping(key), others)
            self.exact[key] = torch.cat([values.new_ones(1), quantiles(values), values.new_ones(1) * own])

    def refreshed(self, keys: Iterable[Key]) -> None:
        """Queues factors that are new; one that waits keeps its turn."""
        self._waiting |= dict.fromkeys(key for key in keys if key in self._widths)

    def estimate(self, problem_of: Callable[[Key], Problem | None]) -> list[Estimate]:
        """Returns the next few. problem_of: returns the inversion of a factor; None if it is not this rank's."""
        keys = [*self._waiting][:MOST]
        for key in keys:
            del self._waiting[key]
        return [Estimate(key, self._widths[key], self._told(key, problem_of)) for key in keys]

    def _told(self, key: Key, problem_of: Callable[[Key], Problem | None]) -> Tensor | None:
        problem = None if key in self.exact else problem_of(key)
        return None if problem is None else tridiagonal(problem)


def _is_diagonal(form: FactorForm) -> bool:
    return form.direct is not None and form.direct.method is Method.RECIPROCAL

"""The statistics and the caches of all layers. A rank fills those of the layers that it inverts or holds.

Statistics are always current; a cache is rebuilt from them when one of its statistics was due.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose

from torch import Tensor

from ngd_dist.config import NGDConfig
from ngd_dist.covered import CoveredLayers, layers_with_few_rows, stacks_of
from ngd_dist.distributed import GlobalMeans, RefreshReport, Sync
from ngd_dist.distributed.base import CaptureCount
from ngd_dist.errors import InversionError
from ngd_dist.factors.caches import Caches
from ngd_dist.inversion import Ending, Inverse, Problem, Solution, solve
from ngd_dist.preconditioners import Cache
from ngd_dist.statistics.staleness import (
    REFRESHED,
    Schedule,
    Track,
    Verdict,
    error_threshold,
    judge,
    judge_error,
    threshold_for,
)
from ngd_dist.statistics.statistic import Key, Statistic, by_layer
from ngd_dist.step.agreement import shares_of
from ngd_dist.step.finite import are_finite
from ngd_dist.step.spectra import Spectra
from ngd_dist.telemetry import Refresh

__all__ = ["Curvature", "failed_inversions", "schedule_for", "too_many_failed"]

# If a layer's damping has moved by more than this share, its cache is built again from the present statistics. One
# adaptation of Levenberg-Marquardt moves it further, to 0.95 ** 5 = 0.77 of it.
DAMPING_DRIFT = 0.1


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """The outcome of rebuilding: the endings by layer, the solutions, and the seconds that each solution took."""

    endings: dict[str, Mapping[str, Ending]]
    solutions: Mapping[Key, Solution]
    seconds: Mapping[Key, float]


class Curvature:
    """Holds the statistics and caches, refreshes them, and turns gradients into directions."""

    def __init__(self, layers: CoveredLayers, sync: Sync, config: NGDConfig) -> None:
        self._layers = layers
        self._sync = sync
        self._staleness, self._thresholds = config.staleness, config.preconditioner.thresholds
        self._inversion = config.inversion
        self._power = config.power_of_positions
        self.stacks = stacks_of(layers, sync.placement.roles)
        methods = {name: covered.method for name, covered in layers.items()}
        self.caches = Caches(
            {name: method.entries for name, method in methods.items()},
            config.inverse_dtype,
            {name: method.shared for name, method in methods.items()},
        )
        # The layers of which a step's rows may stand for a dense factor; and those whose directions they make cheaper.
        self.with_few_rows = layers_with_few_rows(layers, config, sync.comm.world_size)
        self.with_rows: set[str] = set()
        self._takes_rows = sync.comm.world_size == 1
        self._reads_loss, self._part = config.fisher.kind == "empirical", config.statistics_fraction
        self._fresh: dict[str, frozenset[str]] = {}
        # By layer that has been refreshed; the same on every rank, since it decides which caches travel.
        self.damped_with: dict[str, float] = {}
        self.spectra: Spectra | None = None  # not asked for
        adapts = config.staleness.kind == "adaptive"  # a fixed interval does not depend on changes
        self.statistics = {
            Key(name, spec.name): Statistic(
                spec, ema_decay=config.ema_decay, remembers=adapts and (spec.is_local or sync.reports(name))
            )
            for name, method in methods.items()
            for spec in method.statistics
        }

    def inherit(self, old: "Curvature") -> None:
        """Takes over the state of the layers that both have, each on the same ranks."""
        for name in self.caches.keys() & old.caches.keys():
            self.caches[name] = old.caches[name]
        self.caches.elsewhere = {name: cache for name, cache in old.caches.elsewhere.items() if name in self.caches}
        self.damped_with = {name: used for name, used in old.damped_with.items() if name in self.caches}
        self.with_rows = {name for name in old.with_rows if name in self.caches}
        self.statistics |= {key: value for key, value in old.statistics.items() if key in self.statistics}

    def directions(
        self, gradients: Mapping[str, Tensor], captured: Callable[[str], tuple[Tensor, Tensor] | None]
    ) -> dict[str, Tensor]:
        """Returns the directions of the layers that this rank holds, [B, O, I]; without a cache, the gradient itself.

        captured: returns the rows of a layer's gradient that were kept in this step. If they, or those behind a new
        statistic, make a direction cheaper and the gradient is made of them, it is taken from the rows.
        """
        with_rows = (name for name in gradients if name in self._fresh or name in self.with_rows)
        rows = {name: of_layer for name in with_rows if (of_layer := self._rows(name, captured)) is not None}
        shares = shares_of({n: (gradients[n].to(self._layers[n].layer.dtype), *rows[n]) for n in rows})
        directions = {}
        for name, share in shares.items():
            cache = self.caches[name]
            assert cache is not None
            directions[name] = self._layers[name].method.apply_rows(cache, *rows[name], share)
        others = {name: gradient for name, gradient in gradients.items() if name not in shares}
        for stack in self.stacks:
            directions |= stack.apply(self.caches, others)
        return directions

    def lacking(self, layers: Collection[str]) -> frozenset[str]:
        """Returns those of these layers that have no cache here, so that their direction is the gradient."""
        return frozenset(name for name in layers if not self.caches.has(name))

    def note_rows(self, name: str, rows: int) -> None:
        """Decides whether the layer's directions are cheaper from the rows of a gradient.

        rows: the number behind the layer's statistics, which may be those of a part of the batch.
        """
        cache = self.caches[name] if self._takes_rows and rows else None
        pays = cache is not None and self._layers[name].method.rows_pay(cache, round(rows / self._part))
        (self.with_rows.add if pays else self.with_rows.discard)(name)

    def _rows(self, name: str, captured: Callable[[str], tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
        cache, fresh = self.caches[name], self._fresh.get(name, frozenset())
        return None if cache is None else self._layers[name].method.gradient_rows(cache, fresh, lambda: captured(name))

    def refresh(
        self,
        due: Sequence[Key],
        means: GlobalMeans,
        seconds: Callable[[Key], float],
        averaged: Collection[Key] = frozenset(),
    ) -> dict[Key, RefreshReport]:
        """Collective. Returns a report on each due statistic of the layers that this rank inverts.

        `seconds`: the time that estimating a statistic took here; the time of its inversion is added. `averaged`: the
        due statistics that make no new inverse in this step.
        Folds the means in, inverts, and gives the new caches to all ranks that hold the layers or need a part of them.
        """
        folded = self._fold_all([key for key in due if self._sync.inverts(key.layer)], means)
        for key in averaged:
            if key in folded and folded[key].verdict in REFRESHED:
                folded[key] = replace(folded[key], verdict=Verdict.AVERAGED)
        refreshed = by_layer(key for key, report in folded.items() if report.rebuilds)
        fresh = {name: frozenset(statistics) for name, statistics in refreshed.items()}
        for name, statistics in fresh.items():
            self._reset_in_basis(name, statistics)
        # If only the damping moved and an inversion fails, the old inverse stays until the next refresh.
        drifted = self._drifted()
        here = [name for name in drifted if self._sync.inverts(name)]
        rebuilt = self._rebuild(fresh | {name: self._redamped(name, fresh) for name in here})
        self.damped_with |= {name: self._layers[name].damping for name in drifted}
        if self.spectra is not None:
            self.spectra.refreshed(key for key in self.statistics if key.layer in drifted)
        kept = ((name, statistics) for name, statistics in fresh.items() if name in self.with_few_rows)
        self._fresh = {name: self._of_the_loss(name, statistics) for name, statistics in kept}
        for name in fresh:
            self.note_rows(name, means.counts[name].rows)
        self._share([key for key in due if key not in averaged], drifted)
        due_of = by_layer(folded)
        return {
            key: _with_ending(key, report, due_of[key.layer], rebuilt, seconds(key)) for key, report in folded.items()
        }

    def telemetry_of(
        self, reports: Mapping[Key, RefreshReport], before: Mapping[Key, Track], after: Mapping[Key, Track], step: int
    ) -> list[Refresh]:
        """Returns the telemetry of each due statistic, from its report and from its track before and after."""
        return [
            Refresh(
                str(key),
                change=report.change,
                change_to_before=report.change_to_before,
                noise=report.noise,
                threshold=report.threshold,
                error=report.error,
                residual=report.residual,
                method=None if report.method is None else report.method.name,
                seconds=report.seconds,
                inversion_seconds=report.inversion_seconds,
                ending=report.ending.name,
                age=step - before[key].refreshed,
                interval=after[key].interval,
                bytes_sent=self._sync.statistic_bytes(key),
            )
            for key, report in reports.items()
        ]

    def note_refreshes(self, reports: Mapping[Key, RefreshReport]) -> None:
        """Notes the layers that were refreshed on any rank, from the reports that every rank has."""
        refreshed = by_layer(key for key, report in reports.items() if report.rebuilds)
        for name, statistics in refreshed.items():
            if name not in self.damped_with or self._layers[name].method.flops_by_statistic.keys() <= set(statistics):
                self.damped_with[name] = self._layers[name].damping
        if self.spectra is not None:
            self.spectra.refreshed(key for key, report in reports.items() if report.rebuilds)

    def problem(self, key: Key) -> Problem | None:
        """Returns the inversion that makes a statistic's part of the cache; None if it is not told of here."""
        values = self._ready(key.layer) if self._sync.reports(key.layer) else None
        if values is None:
            return None
        covered = self._layers[key.layer]
        return covered.method.problems(values, frozenset({key.statistic}), covered.damping, None).get(key.statistic)

    def take(self, name: str, entries: Cache | None) -> None:
        """Keeps entries of a layer's cache that another rank made or that were saved; None: there is no cache."""
        if self._sync.holds(name):
            self.caches[name] = None if entries is None else (self.caches[name] or {}) | entries
        elif entries is None or entries.keys() >= set(self._layers[name].method.shared):
            self.caches.elsewhere[name] = entries

    def _of_the_loss(self, name: str, statistics: frozenset[str]) -> frozenset[str]:
        """Returns those of a layer's statistics that are made of all rows of the loss, or of all inputs."""
        if self._part < 1:
            return frozenset()
        specs = self._layers[name].method.statistics
        return statistics & {spec.name for spec in specs if self._reads_loss or not spec.reads_gradients}

    def _share(self, due: Sequence[Key], drifted: Collection[str]) -> None:
        """Sends around the entries that may have changed; shared ones change only with a new basis."""
        moved = dict.fromkeys([*(key.layer for key in due), *drifted])
        rebased = {key.layer for key in due if not self.statistics[key].spec.in_basis}
        entries = {
            name: [e for e in method.entries if name in rebased or e not in method.shared]
            for name in moved
            if (method := self._layers[name].method)
        }
        for name, cache in self._sync.share(self.caches, entries).items():
            self.take(name, cache)

    def _reset_in_basis(self, name: str, fresh: frozenset[str]) -> None:
        """Forgets the statistics that were measured in a basis that is about to be replaced."""
        in_basis = {spec.name for spec in self._layers[name].method.statistics if spec.in_basis}
        if fresh - in_basis:
            for statistic in in_basis:
                self.statistics[Key(name, statistic)].reset()

    def _fold_all(self, keys: Sequence[Key], means: GlobalMeans) -> dict[Key, RefreshReport]:
        """Averages in the statistics that are finite, and returns a report on each of the keys. One host read."""
        new = {key: self._mean(key, means) for key in keys if key in means.statistics}
        finite = dict(zip(new, are_finite([*new.values()]), strict=True))
        return {
            key: self._fold(key, new[key], means.counts[key.layer]) if finite.get(key) else self._unfit(key, means)
            for key in keys
        }

    def _mean(self, key: Key, means: GlobalMeans) -> Tensor:
        spec = self.statistics[key].spec
        factor = means.counts[key.layer].positions.factor(spec, self._power)
        mean = means.statistics[key]
        is_one = isinstance(factor, float) and factor == 1.0  # then no copy
        return (mean if is_one else spec.form.times(mean, factor)).to(self._layers[key.layer].layer.dtype)

    def _unfit(self, key: Key, means: GlobalMeans) -> RefreshReport:
        """Returns the report on a statistic without a value, or with one that must not enter the average."""
        if key in means.statistics:
            return RefreshReport(Verdict.UNUSABLE, Ending.NON_FINITE, rows=means.counts[key.layer].rows)
        verdict = Verdict.MISCOUNTED if key.layer in means.miscounted else Verdict.UNSEEN
        if verdict is Verdict.UNSEEN and self.statistics[key].spec.in_basis and not self.caches.has(key.layer):
            verdict = Verdict.UNUSABLE  # its layer may have run, but there is no basis to measure in
        return RefreshReport(verdict, Ending.OK)

    def _fold(self, key: Key, mean: Tensor, count: CaptureCount) -> RefreshReport:
        statistic = self.statistics[key]
        spread = statistic.spread
        change = statistic.fold(mean)
        error, bound = self._error(key), error_threshold(self._staleness)
        if error is not None and bound is not None:
            return RefreshReport(judge_error(error, bound), Ending.OK, count.rows, threshold=bound, error=error)
        noise = count.noise(key.statistic, change.norm)
        threshold = threshold_for(self._staleness, key.statistic, noise * spread, self._thresholds)
        verdict = judge(change, threshold)
        report = RefreshReport(verdict, Ending.OK, count.rows, noise=noise, threshold=threshold)
        return replace(report, change=change.to_last, change_to_before=change.to_before)

    def _error(self, key: Key) -> float | None:
        """Returns the error of the inverse in use for the new value, read back; None if the policy measures none."""
        if error_threshold(self._staleness) is None:
            return None
        old, statistics = self.caches[key.layer], self._ready(key.layer)
        if old is None or statistics is None:
            return None
        error = self._layers[key.layer].method.error(key.statistic, statistics, self._layers[key.layer].damping, old)
        return None if error is None else float(error)

    def _rebuild(self, fresh: Mapping[str, frozenset[str]]) -> "_Rebuilt":
        """Rebuilds the caches of these layers from their statistics.

        A layer is left as it is until each of its statistics in the standard basis has a value.
        """
        arguments = {
            name: (values, new, self._layers[name].damping, self.caches[name])
            for name, new in fresh.items()
            if (values := self._ready(name)) is not None and (new or self.caches.has(name))
        }
        problems = dict(pair for stack in self.stacks for pair in stack.problems(arguments))
        # Problems that all ranks solve are batched apart: batched alike, they have the same bits on each rank.
        alike = {name for name in arguments if self._sync.is_replicated(name) and not self._sync.is_local(name)}
        replicated = {key: problem for key, problem in problems.items() if key.layer in alike}
        alone = {key: problem for key, problem in problems.items() if key not in replicated}
        start = time.perf_counter()
        solutions = solve(replicated, self._inversion) | solve(alone, self._inversion)
        if self.spectra is not None:
            owned = {key: problem for key, problem in problems.items() if self._sync.reports(key.layer)}
            self.spectra.note(owned, solutions, lambda key: self._layers[key.layer].damping)
        rebuilt = _Rebuilt({}, solutions, _shares(time.perf_counter() - start, problems))
        of_layer: dict[str, dict[str, Solution]] = defaultdict(dict)
        for key, solution in solutions.items():
            of_layer[key.layer][key.statistic] = solution
        for name, inputs in arguments.items():
            refreshed = self._layers[name].method.refresh(*inputs, of_layer[name])
            self.caches[name] = refreshed.cache
            rebuilt.endings[name] = refreshed.endings
        return rebuilt

    def _ready(self, name: str) -> dict[str, Tensor] | None:
        """Returns the layer's statistics; None if one that the cache needs has no value yet."""
        specs = self._layers[name].method.statistics
        values = {spec.name: self.statistics[Key(name, spec.name)].value for spec in specs}
        if any(values[spec.name] is None and not spec.in_basis for spec in specs):
            return None
        return {statistic: value for statistic, value in values.items() if value is not None}

    def _drifted(self) -> list[str]:
        """Returns the layers whose damping has moved since the whole cache was damped, the same on every rank."""
        return [
            name
            for name, used in self.damped_with.items()
            if not isclose(used, self._layers[name].damping, rel_tol=DAMPING_DRIFT)
        ]

    def _redamped(self, name: str, fresh: Mapping[str, frozenset[str]]) -> frozenset[str]:
        """Returns the statistics that count as new if a layer is damped again: any that makes a part of the cache."""
        return fresh[name] | self._layers[name].method.flops_by_statistic.keys() if name in fresh else frozenset()


def schedule_for(layers: CoveredLayers, config: NGDConfig) -> Schedule:
    """Returns the schedule of these layers' statistics, in the order of layers and of their statistics."""
    specs = {Key(name, spec.name): spec for name, covered in layers.items() for spec in covered.method.statistics}
    return Schedule(
        list(specs),
        lambda layer, rows: layers[layer].method.work(rows),
        config.staleness,
        stagger=config.stagger,
        cap=config.refresh_cap,
        in_basis=[key for key, spec in specs.items() if spec.in_basis],
    )


def failed_inversions(before: int, reports: Mapping[Key, RefreshReport]) -> int:
    """Returns the failures of the whole run, from those before this step and this step's reports."""
    return before + sum(report.ending is not Ending.OK for report in reports.values())


def too_many_failed(bound: int | None, before: int, reports: Mapping[Key, RefreshReport]) -> InversionError | None:
    """Returns an error if this step's failures exceed the bound; it names the first of them."""
    failures = failed_inversions(before, reports)
    if bound is None or failures == before or failures <= bound:
        return None
    key, report = next((key, report) for key, report in reports.items() if report.ending is not Ending.OK)
    return InversionError(
        f"{failures} inversions have failed, of which max_failed_inversions allows {bound}; the last was that of "
        f"{key}, {report.ending.name}: {report.ending.advice}. The weights are as they were before this step"
    )


def _with_ending(
    key: Key, report: RefreshReport, due: Collection[str], rebuilt: _Rebuilt, seconds: float
) -> RefreshReport:
    """Returns the report with the ending of its inversion, or of one for a statistic of its layer that was not `due`.

    seconds: the time that estimating took here; that of the inversion is added.
    """
    endings, solution = rebuilt.endings.get(key.layer, {}), rebuilt.solutions.get(key)
    of_others = (ending for statistic, ending in endings.items() if statistic not in due)
    ending = max(report.ending, endings.get(key.statistic, Ending.OK), *of_others)
    verdict = report.verdict if ending is Ending.OK else Verdict.UNUSABLE
    residual = solution.residual if isinstance(solution, Inverse) else report.residual
    inverting = rebuilt.seconds.get(key, 0.0)
    told = replace(report, verdict=verdict, ending=ending, residual=residual, seconds=seconds + inverting)
    return replace(told, inversion_seconds=inverting, method=None if solution is None else solution.method)


def _shares(seconds: float, problems: Mapping[Key, Problem]) -> dict[Key, float]:
    """Returns the seconds of each problem: the time of solving all at once, shared out by n^3 for n^2 numbers."""
    weights = {key: problem.factor.numel() ** 1.5 for key, problem in problems.items()}
    total = sum(weights.values())
    return {key: seconds * weight / total for key, weight in weights.items()}

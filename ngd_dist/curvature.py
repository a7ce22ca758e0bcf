"""The statistics and the caches of all layers, of which this rank fills those that its strategy lets it hold.

Statistics are always current; a cache is rebuilt from them when one of its statistics was due.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isclose

import torch
from torch import Tensor

from ngd_dist.config import NGDConfig
from ngd_dist.inversion import Ending
from ngd_dist.layers import Layer
from ngd_dist.preconditioners import Cache, Preconditioner
from ngd_dist.staleness import REFRESHED, Verdict, judge
from ngd_dist.statistics import Key, Statistic
from ngd_dist.strategies import Collected, Report, Strategy

__all__ = ["Curvature"]

# A cache is built again, from the statistics at hand, when its layer's damping has moved by more than this share:
# less than what Levenberg-Marquardt moves it by in one adaptation (to 0.95 ** 5 = 0.77 of it).
DAMPING_DRIFT = 0.1


class Curvature:
    """What turns gradients into directions. `damping_of` gives a layer's damping at the time of a refresh."""

    def __init__(
        self,
        layers: Sequence[Layer],
        preconditioners: Mapping[str, Preconditioner],
        strategy: Strategy,
        config: NGDConfig,
        damping_of: Callable[[str], float],
    ) -> None:
        self._dtypes = {layer.name: layer.dtype for layer in layers}
        self._preconditioners = preconditioners
        self._strategy = strategy
        self._staleness = config.staleness
        self._damping_of = damping_of
        self.caches: dict[str, Cache | None] = {layer.name: None for layer in layers}
        # What other ranks made and `estimate` reads; on the ranks that hold a layer its cache has it too.
        self.shared: dict[str, Cache | None] = {}
        self.damped_with: dict[str, float] = {}
        self.statistics = {
            Key(name, spec.name): Statistic(spec, ema_decay=config.ema_decay, remembers=strategy.reports(name))
            for name, preconditioner in preconditioners.items()
            for spec in preconditioner.statistics
        }

    def shared_of(self, name: str) -> Cache:
        """Returns the entries of the layer's cache that `estimate` reads; empty before the first refresh."""
        source = self.caches[name] or self.shared.get(name) or {}
        return {entry: source[entry] for entry in self._preconditioners[name].shared if entry in source}

    def shared_by(self, due: Sequence[Key]) -> dict[str, Cache | None]:
        """Returns what the other ranks need of the due layers that are held here."""
        layers = dict.fromkeys(key.layer for key in due if self._preconditioners[key.layer].shared)
        return {
            name: None if self.caches[name] is None else self.shared_of(name)
            for name in layers
            if self._strategy.holds(name)
        }

    def take_shared(self, caches: Mapping[str, Cache | None]) -> None:
        """Keeps what `estimate` reads of the caches of layers that other ranks hold."""
        for name, cache in caches.items():
            entries, dtype = self._preconditioners[name].shared, self._dtypes[name]
            if entries and not self._strategy.holds(name):
                # What has travelled has the widest dtype of all layers, and so have the gradients below.
                self.shared[name] = None if cache is None else {entry: cache[entry].to(dtype) for entry in entries}

    def apply(self, name: str, grad_BOI: Tensor) -> Tensor:
        """Returns the direction, [B, O, I]; the gradient itself while the layer has no cache."""
        cache = self.caches[name]
        grad_BOI = grad_BOI.to(self._dtypes[name])
        return grad_BOI if cache is None else self._preconditioners[name].apply(cache, grad_BOI)

    def refresh(self, due: Sequence[Key], means: Collected) -> dict[Key, Report]:
        """Returns a report on each due statistic of the layers held here, after folding it in and inverting."""
        reports: dict[Key, Report] = {}
        for name in dict.fromkeys(key.layer for key in due if self._strategy.holds(key.layer)):
            reports |= self._refresh_layer(name, [key for key in due if key.layer == name], means)
        self._damp_again()
        return reports

    def _refresh_layer(self, name: str, due: Sequence[Key], means: Collected) -> dict[Key, Report]:
        """Folds in what is due and rebuilds the cache; what was measured in a basis that is made anew starts anew."""
        in_basis = {spec.name for spec in self._preconditioners[name].statistics if spec.in_basis}
        found = {key: self._fold(key, means) for key in due}
        fresh = frozenset(key.statistic for key, report in found.items() if report.verdict in REFRESHED)
        if fresh - in_basis:
            for statistic in in_basis:
                self.statistics[Key(name, statistic)].reset()
        endings = self._rebuild(name, fresh) if fresh else {}
        waiting = endings.keys() - {key.statistic for key in found}
        reports: dict[Key, Report] = {}
        for key, report in found.items():
            ending = max([report.ending, *(endings.get(s, Ending.OK) for s in {key.statistic} | waiting)])
            verdict = report.verdict if ending is Ending.OK else Verdict.UNUSABLE
            reports[key] = Report(verdict, ending, report.change)
        return reports

    def _fold(self, key: Key, means: Collected) -> Report:
        if key not in means.statistics:
            verdict = Verdict.MISCOUNTED if key.layer in means.miscounted else Verdict.UNSEEN
            if verdict is Verdict.UNSEEN and self.statistics[key].spec.in_basis and self.caches[key.layer] is None:
                verdict = Verdict.UNUSABLE  # its layer may have run: there is no basis to measure in
            return Report(verdict, Ending.OK, float("inf"))
        mean = means.statistics[key].to(self._dtypes[key.layer])
        if not bool(torch.isfinite(mean).all()):  # one host read per refresh; a bad value must not enter the average
            return Report(Verdict.UNUSABLE, Ending.NON_FINITE, float("inf"))
        statistic = self.statistics[key]
        change = statistic.fold(statistic.spec.expand(mean))
        staleness = self._staleness
        threshold = getattr(staleness.thresholds, key.statistic) if staleness.kind == "adaptive" else float("inf")
        return Report(judge(change, threshold), Ending.OK, change.to_last)

    def _rebuild(self, name: str, fresh: frozenset[str]) -> Mapping[str, Ending]:
        """Rebuilds one layer's cache; does nothing until each of its statistics in the standard basis has a value."""
        preconditioner = self._preconditioners[name]
        values = {spec.name: self.statistics[Key(name, spec.name)].value for spec in preconditioner.statistics}
        ready = {key: value for key, value in values.items() if value is not None}
        if any(spec.name not in ready and not spec.in_basis for spec in preconditioner.statistics):
            return {}
        damping = self._damping_of(name)
        refreshed = preconditioner.refresh(ready, fresh, damping, self.caches[name])
        self.caches[name] = refreshed.cache
        self.damped_with[name] = damping
        return refreshed.endings

    def _damp_again(self) -> None:
        """Rebuilds the caches held here whose damping has moved. What fails stays, until the next refresh."""
        for name, cache in self.caches.items():
            if cache is not None and not isclose(self.damped_with[name], self._damping_of(name), rel_tol=DAMPING_DRIFT):
                self._rebuild(name, frozenset())

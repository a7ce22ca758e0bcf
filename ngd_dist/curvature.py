"""The statistics and the caches of all layers, of which this rank fills those that its strategy lets it hold.

Statistics are always current; a cache is rebuilt from them when one of its statistics was due.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ngd_dist.config import NGDConfig
from ngd_dist.inversion import Ending
from ngd_dist.layers import Layer
from ngd_dist.preconditioners import Cache, Preconditioner
from ngd_dist.staleness import Verdict, judge
from ngd_dist.statistics import Key, Statistic
from ngd_dist.strategies import Collected, Report, Strategy

__all__ = ["Curvature"]

NOT_FOLDED = (Verdict.UNSEEN, Verdict.UNUSABLE, Verdict.MISCOUNTED)


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
        self.statistics = {
            Key(name, spec.name): Statistic(spec, ema_decay=config.ema_decay, remembers=strategy.reports(name))
            for name, preconditioner in preconditioners.items()
            for spec in preconditioner.statistics
        }

    def apply(self, name: str, grad_OI: Tensor) -> Tensor:
        """Returns the direction, [O, I]; the gradient itself while the layer has no cache."""
        cache = self.caches[name]
        return grad_OI if cache is None else self._preconditioners[name].apply(cache, grad_OI)

    def refresh(self, due: list[Key], means: Collected) -> dict[Key, Report]:
        """Returns a report on each due statistic of the layers held here, after folding it in and inverting."""
        reports: dict[Key, Report] = {}
        for name in dict.fromkeys(key.layer for key in due if self._strategy.holds(key.layer)):
            found = {key: self._fold(key, means) for key in due if key.layer == name}
            endings = self._invert(name) if any(r.verdict not in NOT_FOLDED for r in found.values()) else {}
            waiting = endings.keys() - {key.statistic for key in found}
            for key, report in found.items():
                ending = max([report.ending, *(endings.get(s, Ending.OK) for s in {key.statistic} | waiting)])
                verdict = report.verdict if ending is Ending.OK else Verdict.UNUSABLE
                reports[key] = Report(verdict, ending, report.change)
        return reports

    def _fold(self, key: Key, means: Collected) -> Report:
        if key not in means.statistics:
            verdict = Verdict.MISCOUNTED if key.layer in means.miscounted else Verdict.UNSEEN
            return Report(verdict, Ending.OK, float("inf"))
        mean = means.statistics[key].to(self._dtypes[key.layer])
        if not bool(torch.isfinite(mean).all()):  # one host read per refresh; a bad value must not enter the average
            return Report(Verdict.UNUSABLE, Ending.NON_FINITE, float("inf"))
        statistic = self.statistics[key]
        change = statistic.fold(statistic.spec.expand(mean))
        staleness = self._staleness
        threshold = getattr(staleness.thresholds, key.statistic) if staleness.kind == "adaptive" else float("inf")
        return Report(judge(change, threshold), Ending.OK, change.to_last)

    def _invert(self, name: str) -> Mapping[str, Ending]:
        """Rebuilds one layer's cache; does nothing until each of its statistics has a value."""
        preconditioner = self._preconditioners[name]
        values = {spec.name: self.statistics[Key(name, spec.name)].value for spec in preconditioner.statistics}
        ready = {key: value for key, value in values.items() if value is not None}
        if len(ready) < len(values):
            return {}
        refreshed = preconditioner.refresh(ready, self._damping_of(name), self.caches[name])
        self.caches[name] = refreshed.cache
        return refreshed.endings

"""Plans the next refresh of each statistic. Everything here is a pure function of integers that every rank has.

A statistic's owner measures its change and sends a verdict. Every rank then applies the same rules to the same
verdicts, so that the due sets, which shape the next collectives, can't differ between ranks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from functools import lru_cache
from math import ceil, inf
from types import MappingProxyType

from ngd_dist.config import DEFAULT_THRESHOLD, AdaptiveInterval, FixedInterval
from ngd_dist.statistics.statistic import Change, Key

__all__ = [
    "REFRESHED",
    "Schedule",
    "Track",
    "Verdict",
    "adaptive_interval",
    "error_threshold",
    "judge",
    "judge_error",
    "threshold_for",
]


class Verdict(IntEnum):
    """The judgement on a refreshed statistic. The integer travels between ranks."""

    CHANGED = 0
    MOVING = 1
    SETTLED = 2
    UNSEEN = 3  # no rank captured it: its layer did not run
    UNUSABLE = 4  # not finite, or not invertible: the old inverse stays in use
    MISCOUNTED = 5  # some rank captured it more often than there are micro-batches
    AVERAGED = 6  # it is in the average, from which no inverse is made yet


def judge(change: Change, threshold: float) -> Verdict:
    """Returns CHANGED if the newest value is unlike the last, MOVING if unlike the one before, else SETTLED.

    X is like Y if its relative change is below the threshold, which NaN never is. Source: [OT20], stale statistics.
    """
    if not change.to_last < threshold:
        return Verdict.CHANGED
    if not change.to_before < threshold:
        return Verdict.MOVING
    return Verdict.SETTLED


def judge_error(error: float, threshold: float) -> Verdict:
    """Returns CHANGED from the threshold on, MOVING from half of it on, else SETTLED. NaN is above any threshold.

    The error is that of an inverse, which stays in use until the error reaches the threshold. The two bounds take the
    place of the last two values.
    """
    if not error < threshold:
        return Verdict.CHANGED
    return Verdict.MOVING if error >= threshold / 2 else Verdict.SETTLED


# A statistic that has doubled or halved has changed by 1, whatever its noise.
MAX_THRESHOLD_OF_NOISE = 1.0


def threshold_for(
    policy: AdaptiveInterval | FixedInterval,
    statistic: str,
    noise: float,
    defaults: Mapping[str, float] = MappingProxyType({}),
) -> float:
    """Returns the change from which on a statistic counts as changed: the configured one, or more if it is noisy.

    `noise`: the relative change that sampling alone makes expected. The newest value has the sampling error of one
    batch, and the average in use has an error that a long memory makes small (`Statistic.spread`). Infinity if it was
    not measured. `defaults`: the thresholds of the method's statistics, if the policy sets no other. Under fixed
    intervals the threshold is infinite.
    """
    if isinstance(policy, FixedInterval):
        return inf
    configured = policy.thresholds.of(statistic)
    fixed = defaults.get(statistic, DEFAULT_THRESHOLD) if configured is None else configured
    if noise == inf:
        return fixed
    return max(fixed, min(policy.noise_margin * noise, MAX_THRESHOLD_OF_NOISE))


def error_threshold(policy: AdaptiveInterval | FixedInterval) -> float | None:
    """Returns the largest error at which the inverse in use is kept; None if the policy measures none."""
    if isinstance(policy, AdaptiveInterval) and policy.criterion == "error":
        return policy.error_threshold
    return None


def adaptive_interval(verdict: Verdict, last: int, before: int) -> int:
    """Returns the next interval: the same if MOVING, the sum of the last two if SETTLED, else half the last.

    Identical statistics give 1, 1, 2, 3, 5, 8, ... Source: [OT20], stale statistics.
    """
    if verdict is Verdict.MOVING:
        return last
    if verdict is Verdict.SETTLED:
        return last + before
    return max(1, last // 2)


@dataclass(frozen=True, slots=True)
class Track:
    """The schedule of one statistic, in optimizer steps; step numbers start at 1.

    `due` is at most `interval` after the last refresh: staggering may make it less, and a new basis one step more.
    A statistic that is due may have to wait for its turn. `refreshed` is the step of the value in use: 0 until
    there is one, and unchanged by a refresh that gave nothing usable. `rows`: the number from which all ranks estimated
    it when it was last seen. `inverse_due`: the step from which on a new value makes a new inverse, the same for all
    statistics of a layer. It is later than `due` if a `FixedInterval` has `statistics_steps`.
    """

    due: int = 1
    refreshed: int = 0
    interval: int = 1
    interval_before: int = 1
    rows: int = 0
    inverse_due: int = 1


# The operations of refreshing some of a layer's statistics, each estimated from this number of rows.
Work = Callable[[str, Mapping[str, int]], int]
# Without a cap, a step may do this many times the mean work that the intervals ask for. With much less than 1/4 above
# the mean, statistics wait longer and longer; with more, steps differ by more.
CAP_MARGIN = 1.25
NEVER = 2**62
REFRESHED = (Verdict.CHANGED, Verdict.MOVING, Verdict.SETTLED)


class Schedule:
    """The tracks of all statistics: replicated on every rank, advanced by the same verdicts everywhere."""

    def __init__(
        self,
        keys: Sequence[Key],
        work: Work,
        policy: AdaptiveInterval | FixedInterval,
        *,
        stagger: float,
        cap: float | None = None,
        in_basis: Collection[Key] = (),
    ) -> None:
        """`keys` gives the order in which ties are broken. `cap` is `NGDConfig.refresh_cap`.

        The statistics `in_basis` are measured in a basis that the others of their layer make, and start again a step
        after it. The others skip that step: nothing could be measured in a basis that every step replaces.
        """
        self.tracks: dict[Key, Track] = {key: Track(due=NEVER if key in in_basis else 1) for key in keys}
        self._in_basis = frozenset(in_basis)
        self._work = _remembered(work)
        self._policy = policy
        self._stagger = stagger
        self._cap = cap

    def due(self, step: int) -> list[Key]:
        """Returns the statistics to refresh in this step, in registration order.

        A statistic without a value is refreshed at once. The others follow as far as the cap allows, most overdue first
        and one layer at least; none is passed over for a cheaper one, so that expensive ones have their turn.
        """
        due = [key for key, track in self.tracks.items() if track.due <= step]
        # A measurement in the basis that this step replaces would be thrown away.
        replaced = {key.layer for key in due if key not in self._in_basis and self.inverts(step, key)}
        due = [key for key in due if key not in self._in_basis or key.layer not in replaced]
        waiting = sorted((key for key in due if self.tracks[key].refreshed > 0), key=lambda key: self.tracks[key].due)
        late = set(waiting[self._fitting(waiting) :])
        return [key for key in due if key not in late]

    def inverts(self, step: int, key: Key) -> bool:
        """Returns whether a value of this step makes a new inverse or, in a basis, a new part of the cache."""
        return key in self._in_basis or step >= self.tracks[key].inverse_due

    def advance(self, step: int, verdicts: Mapping[Key, Verdict], rows: Mapping[Key, int] | None = None) -> None:
        """Plans the next refresh of each statistic that was `due` in this step, from its verdict, in the same order.

        rows: the number behind each.
        """
        planned_before = ((t.due, key, t.rows) for key, t in self.tracks.items() if step < t.due < NEVER)
        plan = _Plan(self._work, planned_before if verdicts else ())
        for key, verdict in verdicts.items():
            track = self.tracks[key]
            if verdict is Verdict.UNSEEN:
                self.tracks[key] = replace(track, due=step + 1)
                continue
            interval = self._interval(verdict, track)
            seen = (rows or {}).get(key, 0) or track.rows
            planned = self._quietest(plan, key, seen, step, interval)
            refreshed = step if verdict in REFRESHED else track.refreshed
            self.tracks[key] = Track(planned, refreshed, interval, track.interval, seen, track.inverse_due)
            plan.add(planned, key, seen)
        rebuilding = (Verdict.CHANGED,) if error_threshold(self._policy) else REFRESHED
        rebuilt = {key.layer for key in verdicts if key not in self._in_basis and verdicts[key] in rebuilding}
        self._plan_inverses(rebuilt, step)
        self._restart({key.layer for key in self._in_basis} & rebuilt, step)

    def inherit(self, old: "Schedule") -> None:
        """Takes over the tracks of the statistics that both have."""
        self.tracks |= {key: track for key, track in old.tracks.items() if key in self.tracks}

    def state(self, step: int = 0, unsaved: Collection[Key] = ()) -> list[dict[str, int]]:
        """Returns the tracks after this step as plain integers, in key order.

        unsaved: the statistics without a value in the saved state: they are due in the step after it.
        """
        return [
            asdict(_without_value(track, step + 1) if key in unsaved else track) for key, track in self.tracks.items()
        ]

    def _restart(self, layers: Collection[str], step: int) -> None:
        """Plans the first measurements in these layers' new bases, and keeps the bases until then."""
        for key, track in self.tracks.items():
            if key.layer in layers:
                is_first = key in self._in_basis
                first = Track(due=step + 1, rows=track.rows, inverse_due=track.inverse_due)
                earliest = step + 2 if self.inverts(step + 1, key) else step + 1
                self.tracks[key] = first if is_first else replace(track, due=max(track.due, earliest))

    def _plan_inverses(self, layers: Collection[str], step: int) -> None:
        """Plans the next inverses of these layers, each on a step of as few others as stagger allows."""
        if not isinstance(self._policy, FixedInterval) or self._policy.statistics_steps is None:
            return
        last, due_of = step + self._policy.steps, {key.layer: track.inverse_due for key, track in self.tracks.items()}
        planned = Counter(due for layer, due in due_of.items() if layer not in layers)
        candidates = range(last, step + max(1, ceil(self._policy.steps * (1 - self._stagger))) - 1, -1)
        for layer in (name for name in due_of if name in layers):  # in the same order on every rank
            due_of[layer] = min(candidates, key=lambda candidate: planned[candidate])
            planned[due_of[layer]] += 1
        self.tracks |= {key: replace(track, inverse_due=due_of[key.layer]) for key, track in self.tracks.items()}

    def _interval(self, verdict: Verdict, track: Track) -> int:
        if isinstance(self._policy, FixedInterval):
            return self._policy.estimate_steps
        grown = adaptive_interval(verdict, track.interval, track.interval_before)
        return min(grown, self._policy.max_interval)

    def _fitting(self, waiting: Sequence[Key]) -> int:
        """Returns the number of these, in this order, that one step has room for."""
        room = self._room() if len(waiting) > 1 else inf
        if room == inf or _Plan(self._work, ((0, key, self.tracks[key].rows) for key in waiting)).total(0) <= room:
            return len(waiting)
        plan = _Plan(self._work)
        for count, key in enumerate(waiting):
            rows = self.tracks[key].rows
            is_too_much = plan.total(0) + plan.added(0, key, rows) > room
            if count > 0 and is_too_much and not plan.saved(0, key, rows):
                return count
            plan.add(0, key, rows)
        return len(waiting)

    def _room(self) -> float:
        """Returns the operations that one step may spend on statistics that could wait."""
        if self._cap is None and self._stagger == 0:
            return inf
        by_layer: dict[str, list[tuple[int, Key]]] = defaultdict(list)
        for key, track in self.tracks.items():
            if key not in self._in_basis and (self._cap is not None or track.refreshed > 0):
                by_layer[key.layer].append((1 if self._cap is not None else track.interval, key))
        mean, plan = 0.0, _Plan(self._work)
        for layer, of_layer in by_layer.items():
            if len({interval for interval, _ in of_layer}) == 1:
                rows = {key.statistic: self.tracks[key].rows for _, key in of_layer}
                mean += self._work(layer, rows) / of_layer[0][0]
                continue
            # A rarer refresh meets the more frequent ones of its layer, and adds only the work that they don't do.
            for interval, key in sorted(of_layer, key=lambda pair: pair[0]):
                mean += plan.added(0, key, self.tracks[key].rows) / interval
                plan.add(0, key, self.tracks[key].rows)
        return mean * (CAP_MARGIN if self._cap is None else self._cap)

    def _quietest(self, plan: "_Plan", key: Key, rows: int, step: int, interval: int) -> int:
        """Returns the step, at most `interval` away, on which this refresh adds least to the planned work.

        A refresh may come early by the staggering fraction, and is never planned late. If a layer's cache is made of
        all its statistics at once, the step of another one saves work. Ties go to the latest step.
        """
        earliest, latest = step + max(1, ceil(interval * (1 - self._stagger))), step + interval
        if earliest == latest:
            return latest

        def work(candidate: int) -> tuple[int, int, int]:
            saved = plan.saved(candidate, key, rows)
            return plan.total(candidate) + plan.added(candidate, key, rows) - saved, -saved, -candidate

        free = next((candidate for candidate in range(latest, earliest - 1, -1) if not plan.total(candidate)), latest)
        return min({free, *(candidate for candidate in plan.steps if earliest <= candidate <= latest)}, key=work)


def _without_value(track: Track, due: int) -> Track:
    """Returns the track of a statistic whose value is lost before this step."""
    return replace(track, due=min(track.due, due), refreshed=0, inverse_due=min(track.inverse_due, due))


def _remembered(work: Work) -> Work:
    """Returns the same function with a cache: a schedule calls it for all layers several times a step."""

    @lru_cache(maxsize=2**14)
    def cached(layer: str, rows: tuple[tuple[str, int], ...]) -> int:
        return work(layer, dict(rows))

    return lambda layer, rows: cached(layer, tuple(rows.items()))


class _Plan:
    """The statistics to refresh by step, and their work. planned: step, statistic and rows of those to begin with."""

    def __init__(self, work: Work, planned: Iterable[tuple[int, Key, int]] = ()) -> None:
        self._work = work
        self._rows: dict[tuple[int, str], dict[str, int]] = defaultdict(dict)
        self._totals: dict[int, int] = defaultdict(int)
        for step, (layer, statistic), rows in planned:
            self._rows[step, layer][statistic] = rows
        for (step, layer), of_layer in self._rows.items():
            self._totals[step] += work(layer, of_layer)

    @property
    def steps(self) -> Collection[int]:
        return self._totals

    def total(self, step: int) -> int:
        return self._totals.get(step, 0)

    def added(self, step: int, key: Key, rows: int) -> int:
        """Returns the work that one more statistic adds to a step."""
        planned = self._rows.get((step, key.layer))
        with_it = self._work(key.layer, {**(planned or {}), key.statistic: rows})
        return with_it - (self._work(key.layer, planned) if planned else 0)

    def saved(self, step: int, key: Key, rows: int) -> int:
        """Returns the work that is saved against a step without other statistics of its layer."""
        if (step, key.layer) not in self._rows:
            return 0
        return self._work(key.layer, {key.statistic: rows}) - self.added(step, key, rows)

    def add(self, step: int, key: Key, rows: int) -> None:
        self._totals[step] += self.added(step, key, rows)
        self._rows[step, key.layer][key.statistic] = rows

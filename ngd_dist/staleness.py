"""When each statistic is refreshed next. Everything here is a pure function of integers that every rank has.

A statistic's owner measures how far it changed and sends a verdict; every rank then applies the same rules to the
same verdicts, so that the due sets, which shape the next collectives, can't differ between ranks.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from math import ceil

from ngd_dist.config import AdaptiveInterval, FixedInterval
from ngd_dist.statistics import Change, Key

__all__ = ["REFRESHED", "Schedule", "Track", "Verdict", "adaptive_interval", "judge"]


class Verdict(IntEnum):
    """What a refresh showed of a statistic. The integer is what travels between ranks."""

    CHANGED = 0
    MOVING = 1
    SETTLED = 2
    UNSEEN = 3  # no rank captured it: its layer did not run
    UNUSABLE = 4  # not finite, or not invertible: the old inverse stays in use
    MISCOUNTED = 5  # some rank captured it another number of times than there are micro-batches


def judge(change: Change, threshold: float) -> Verdict:
    """Returns CHANGED if the newest value is unlike the last, MOVING if unlike the one before, else SETTLED.

    X is like Y if ||X - Y||_F / ||Y||_F < threshold. A change of NaN is like nothing. Source: [OT20], stale statistics.
    """
    if not change.to_last < threshold:
        return Verdict.CHANGED
    if not change.to_before < threshold:
        return Verdict.MOVING
    return Verdict.SETTLED


def adaptive_interval(verdict: Verdict, last: int, before: int) -> int:
    """Returns the next interval: the same while moving, the sum of the last two once settled, else half the last.

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

    `due` is at most `interval` after the last try: staggering may make it less, and the step for which a new basis is
    left alone one more. `refreshed` is the step of the value that is in use: 0 until there is one, and unmoved by a
    try that gave nothing usable.
    """

    due: int = 1
    refreshed: int = 0
    interval: int = 1
    interval_before: int = 1


NEVER = 2**62
REFRESHED = (Verdict.CHANGED, Verdict.MOVING, Verdict.SETTLED)


class Schedule:
    """The tracks of all statistics: replicated on every rank, advanced by the same verdicts everywhere."""

    def __init__(
        self,
        costs: Mapping[str, int],
        keys: list[Key],
        policy: AdaptiveInterval | FixedInterval,
        stagger: float,
        in_basis: Collection[Key] = (),
    ) -> None:
        """`costs` is that of refreshing each layer, in any unit; `keys` gives the order in which ties are broken.

        The statistics `in_basis` are measured in what the others of their layer made, and start anew a step after.
        The others leave them that step: made anew each time, a basis would never have anything measured in it.
        """
        self.tracks: dict[Key, Track] = {key: Track(due=NEVER if key in in_basis else 1) for key in keys}
        self._in_basis = frozenset(in_basis)
        self._costs = costs
        self._policy = policy
        self._stagger = stagger

    def due(self, step: int) -> list[Key]:
        """Returns the statistics to refresh in this step, in registration order."""
        due = [key for key, track in self.tracks.items() if track.due <= step]
        # What is measured in the basis that this step replaces would be thrown away.
        replaced = {key.layer for key in due if key not in self._in_basis}
        return [key for key in due if key not in self._in_basis or key.layer not in replaced]

    def advance(self, step: int, verdicts: Mapping[Key, Verdict]) -> None:
        """Plans the next refresh of every statistic that was due in this step."""
        due = self.due(step)
        for key in due:
            verdict = verdicts[key]
            track = self.tracks[key]
            if verdict is Verdict.UNSEEN:
                self.tracks[key] = replace(track, due=step + 1)
                continue
            interval = self._interval(verdict, track)
            refreshed = track.refreshed if verdict is Verdict.UNUSABLE else step
            planned = replace(track, refreshed=refreshed, interval=interval, interval_before=track.interval)
            self.tracks[key] = replace(planned, due=self._quietest(key, step, interval))
        rebuilt = {key.layer for key in due if key not in self._in_basis and verdicts[key] in REFRESHED}
        self._begin_anew({key.layer for key in self._in_basis} & rebuilt, step)

    def state(self) -> list[dict[str, int]]:
        """Returns the tracks as plain integers, in key order."""
        return [asdict(track) for track in self.tracks.values()]

    def _begin_anew(self, layers: Collection[str], step: int) -> None:
        """Plans the first measurements in these layers' new bases, which last until then."""
        for key, track in self.tracks.items():
            if key.layer in layers:
                is_first = key in self._in_basis
                self.tracks[key] = Track(due=step + 1) if is_first else replace(track, due=max(track.due, step + 2))

    def _interval(self, verdict: Verdict, track: Track) -> int:
        if isinstance(self._policy, FixedInterval):
            return self._policy.steps
        grown = adaptive_interval(verdict, track.interval, track.interval_before)
        return min(grown, self._policy.max_interval)

    def _quietest(self, key: Key, step: int, interval: int) -> int:
        """Returns the step, at most `interval` away, on which this refresh adds least to the planned work.

        A refresh may come early by the staggering fraction, never late. A step on which the same layer refreshes
        anyway costs nothing more, since a refresh inverts both of the layer's factors. Ties go to the latest step.
        """
        earliest = step + max(1, ceil(interval * (1 - self._stagger)))
        layers: dict[int, set[str]] = defaultdict(set)
        for other, track in self.tracks.items():
            if other != key and earliest <= track.due <= step + interval:
                layers[track.due].add(other.layer)

        def work(candidate: int) -> tuple[int, bool, int]:
            shared = key.layer in layers[candidate]
            return sum(self._costs[layer] for layer in layers[candidate] | {key.layer}), not shared, -candidate

        return min(range(earliest, step + interval + 1), key=work)

"""Names the culprit of a failed collective, by reports that the ranks leave in their group's key-value store.

Without a failure nothing is written. If a rank raises or its collective fails, it appends one line to the group's log.
If its collective failed, it then reads the log until every rank has reported, or until PATIENCE_S is over. A rank that
has not reported by then never arrived. Every call here ends within a few seconds, even if the store hangs.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

__all__ = ["PATIENCE_S", "KeyValueStore", "Postmortem", "Ticket"]

PATIENCE_S = 5.0  # for the reports of the other ranks: their collectives fail within milliseconds of each other
LINGER_S = 0.5  # the rank that hosts the store must not end while the others still read
QUOTED = 500  # characters of an error in a report
LISTED = 8  # ranks in a message

T = TypeVar("T")


class KeyValueStore(Protocol):
    """The methods of a torch.distributed store that are used here; its failures are RuntimeErrors."""

    def append(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...


class Kind(StrEnum):
    RAISED = "raised"  # an error outside of any collective
    FAILED = "failed"  # in a collective
    WENT_ON = "went on"  # takes back this rank's earlier report


class Ticket(NamedTuple):
    """One collective of this rank: its name, and its number among those of the group, or of the links aside."""

    number: int
    collective: str
    is_aside: bool = False


@dataclass(frozen=True)
class FailureReport:
    """One line of the log: the state of a rank in, or after, its `number`-th collective."""

    rank: int
    kind: Kind
    number: int
    collective: str
    is_aside: bool
    error: str


class Postmortem:
    """One rank's reports, shared by all callers of a group's collectives: the ranks compare their counts of these."""

    def __init__(self, rank: int, rank_names: Sequence[str], store: Callable[[], KeyValueStore]) -> None:
        """`store` is called each time, since a reference to the store would keep its server alive after the group."""
        self.rank_names = rank_names
        self._rank = rank
        self._store = store
        self._entered = Ticket(0, "")
        self._count = {False: 0, True: 0}  # by whether they are aside
        self._reported: FailureReport | None = None
        # A group that is formed again over the same store must not read the log of its predecessor.
        lives = _within(PATIENCE_S, lambda: store().add(f"ngd_dist/lives of {rank}", 1))
        self._log = f"ngd_dist/failures in life {lives[0] if lives else 0}"

    def enter(self, collective: str, *, is_aside: bool = False) -> Ticket:
        """Counts a collective, and takes back an earlier report of this rank: it went on."""
        self._count[is_aside] += 1
        self._entered = Ticket(self._count[is_aside], collective, is_aside)
        if self._reported is not None:
            self._report(Kind.WENT_ON, "")
            self._reported = None
        return self._entered

    def raised(self, message: str) -> None:
        """Reports an error of this rank, unless it only follows from a collective that failed."""
        if self._reported is None or self._reported.kind is not Kind.FAILED:
            self._report(Kind.RAISED, message)

    def failed(self, message: str, ticket: Ticket) -> None:
        """Reports that a collective failed on this rank, not always the last that it has entered."""
        self._report(Kind.FAILED, message, ticket)

    def explain(self) -> str:
        """Returns the culprit, in words. Called after `failed`."""
        log = ""

        def read() -> None:
            nonlocal log
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                log = self._store().get(self._log).decode()
                if len(_latest(log)) == len(self.rank_names):
                    time.sleep(LINGER_S)
                    return
                time.sleep(0.05 + len(self.rank_names) / 500)  # the readers' load on the store grows as the square

        if self._reported is not None:
            _within(PATIENCE_S + LINGER_S, read)
        if self._reported is None or not log:
            return "who is to blame is unknown: the group's store, on rank 0 or the launcher, has died or hangs"
        return self._verdict(self._reported, _latest(log))

    def _report(self, kind: Kind, error: str, ticket: Ticket | None = None) -> None:
        report = FailureReport(self._rank, kind, *(ticket or self._entered), error[:QUOTED])
        line = json.dumps(asdict(report)) + "\n"
        is_written = _within(PATIENCE_S, lambda: self._store().append(self._log, line))
        self._reported = report if is_written else None

    def _verdict(self, here: FailureReport, reports: dict[int, FailureReport]) -> str:
        in_order = list(reports.values())
        raised = [report for report in in_order if report.kind is Kind.RAISED]
        missing = [name for rank, name in enumerate(self.rank_names) if rank not in reports]
        strays = [
            r
            for r in in_order
            if (r.is_aside, r.number) == (here.is_aside, here.number) and r.collective != here.collective
            if r not in raised
        ]
        causes = []
        if raised:
            others = f" (and {len(raised) - 1} more)" if raised[1:] else ""
            causes.append(f"{self.rank_names[raised[0].rank]}{others} raised: {raised[0].error}")
        if missing:
            names = ", ".join(missing[:LISTED]) + (f" and {len(missing) - LISTED} more" if missing[LISTED:] else "")
            fate = "died, hang, or were" if missing[1:] else "died, hangs, or was"
            causes.append(f"{names} did not arrive: {fate} still busy {PATIENCE_S:g} s later")
        if strays:
            causes.append(
                f"{self.rank_names[strays[0].rank]} called {strays[0].collective!r} instead; every rank must call "
                "the same collectives in the same order"
            )
        if not causes:
            first = in_order[0]
            first_cause = (
                "this rank failed first"
                if first == here
                else f"{self.rank_names[first.rank]} failed first: {first.error}"
            )
            causes.append(f"every rank arrived, and {first_cause}")
        return "; ".join(causes)


def _latest(log: str) -> dict[int, FailureReport]:
    """Returns the last report of each rank that did not go on, in the order of reporting."""
    reports: dict[int, FailureReport] = {}
    for line in log.splitlines():
        fields = json.loads(line)
        report = FailureReport(**fields | {"kind": Kind(fields["kind"])})
        reports.pop(report.rank, None)
        if report.kind is not Kind.WENT_ON:
            reports[report.rank] = report
    return reports


def _within(seconds: float, task: Callable[[], T]) -> list[T]:
    """Returns the result of the task, or nothing if it failed or takes longer.

    It runs in a thread, since a store on a machine that vanished blocks its clients for ever.
    """
    results: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):
            results.append(task())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results

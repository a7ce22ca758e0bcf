"""The groups of workers of an attempt on Ray, one after another, which may differ in size.

START HERE: `train_in_groups`. Knows of Ray by `Cluster` and `Fit` alone.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ngd_workers.contract.errors import ClusterError
from ngd_workers.contract.events import Event, WorkersResized, WorkersRestarted
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import AttemptDir, Outcome
from ngd_workers.contract.spec import Job
from ngd_workers.launch.waiting import WaitingReporter

__all__ = ["Cluster", "Fit", "GroupFailedError", "NoRoomError", "too_many", "train_in_groups"]

log = logging.getLogger(__name__)

LOOK_S = 10.0  # between two looks at the cluster
STEADY_S = 60.0  # a group that began later is not ended for a larger one: each change costs a start
FILE_S = 30.0
ASKED = "asked for from outside"  # by an empty file


class GroupFailedError(Exception):
    """A group's workers have ended without an outcome. is_preempted: a node was taken away after a notice."""

    def __init__(self, causes: str, *, is_preempted: bool = False) -> None:
        super().__init__(causes)
        self.is_preempted = is_preempted


class NoRoomError(Exception):
    """The workers could not be started: the room that was there is gone."""


class Room(Protocol):
    """A standing request for room. It reserves nothing until all of it is there, and then holds it."""

    def is_there(self) -> bool: ...
    def close(self) -> None: ...


class Cluster(Protocol):
    """What a loop of groups asks of a Ray cluster."""

    @property
    def changes(self) -> bool:
        """Whether nodes may come and go."""
        ...

    def largest_size(
        self, job: Job, tell: Callable[[str | None], None], is_stopped: Callable[[], bool]
    ) -> int | None: ...
    def request(self, job: Job, workers: int) -> Room: ...
    def draining(self, nodes: Sequence[str]) -> list[str]:
        """Returns the addresses of those of the nodes that are to be taken away."""
        ...


class Fit(Protocol):
    """Trains one group. Raises: GroupFailedError, NoRoomError."""

    def __call__(self, group: int, size: int, on_restart: Event) -> Outcome: ...


def train_in_groups(
    attempt_dir: AttemptDir, job: Job, cluster: Cluster, fit: Fit, is_stopped: Callable[[], bool]
) -> Outcome | None:
    """Returns the outcome of the attempt; None if it was stopped while no workers ran.

    Raises: ClusterError once the workers have died more often than failure.worker_restarts allows.
    """
    crashes, group, before, why = 0, 0, 0, ""
    while (size := _size(attempt_dir, job, cluster, is_stopped)) is not None:
        group += 1
        _forget_request(attempt_dir.resize)
        try:
            with _watched(attempt_dir, job, cluster, group, size):
                outcome = fit(group, size, _restart(before, size, why))
        except NoRoomError as error:
            log.warning("%s", error)
            continue
        except GroupFailedError as error:
            log.error("%s", error)
            crashes += not error.is_preempted
            if crashes > job.failure.worker_restarts:
                raise ClusterError(too_many(job.failure.worker_restarts, str(error))) from error
            why = ""
        else:
            if outcome.result != "resized":
                return outcome
            why = _why(attempt_dir)
            log.info("the workers have stopped after step %d: %s", outcome.step, why)
        before = size
    return None


def too_many(restarts: int, causes: str) -> str:
    """Returns the message of an attempt whose workers died once more than they may."""
    return f"the workers failed after {restarts} restarts (failure.worker_restarts); {causes}"


def _size(attempt_dir: AttemptDir, job: Job, cluster: Cluster, is_stopped: Callable[[], bool]) -> int | None:
    """Returns the number of workers that the cluster has room for; None: the attempt is stopped."""
    if is_stopped():
        return None
    waiting = WaitingReporter(attempt_dir)
    try:
        size = cluster.largest_size(job, waiting.tell, is_stopped)
    finally:
        waiting.close()
    return None if is_stopped() else size


def _restart(before: int, size: int, why: str) -> Event:
    """Returns the event that tells of a group that is not the first. why: "" after a crash."""
    if why:
        return WorkersResized(before=before, after=size, message=why)
    changed = f": {size} in place of {before}" if before not in (0, size) else ""
    return WorkersRestarted(message=f"the workers were started again after some of them died{changed}")


def _forget_request(path: Path) -> None:
    insist(lambda: path.unlink(missing_ok=True), f"delete {path}", patience_s=FILE_S)


def _why(attempt_dir: AttemptDir) -> str:
    try:
        return attempt_dir.resize.read_text() or ASKED
    except OSError:
        return ASKED


@contextlib.contextmanager
def _watched(attempt_dir: AttemptDir, job: Job, cluster: Cluster, group: int, size: int) -> Iterator[None]:
    """Asks the group for another size, within, as soon as there is a reason."""
    if not cluster.changes:
        yield
        return
    watch = _Watch(attempt_dir, job, cluster, group, size)
    try:
        yield
    finally:
        watch.close()


class _Watch:
    """Looks at the cluster in a thread: for nodes of the group that are to go, and for room for a larger group."""

    def __init__(self, attempt_dir: AttemptDir, job: Job, cluster: Cluster, group: int, size: int) -> None:
        self._attempt_dir, self._job, self._cluster, self._group = attempt_dir, job, cluster, group
        self._more = next((larger - size for larger in job.sizes if larger > size), 0)
        self._size = size
        self._room: Room | None = None
        self._begun_s = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and gives the room back, which the next group then takes."""
        self._closing.set()
        self._thread.join()
        if self._room is not None:
            self._room.close()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_S):
            try:
                reason = self._reason()
                if reason is not None:
                    self._attempt_dir.resize.write_text(reason)
                    return
            except Exception as error:  # noqa: BLE001 - the boundary of this thread: the next look may succeed
                log.warning("can't look at the Ray cluster; it is tried again: %s: %s", type(error).__name__, error)

    def _reason(self) -> str | None:
        folder = self._attempt_dir.nodes(self._group)
        nodes = [path.name for path in folder.iterdir()] if folder.exists() else []
        if not nodes:
            return None  # no worker has begun
        self._begun_s = self._begun_s or time.monotonic()
        if leaving := self._cluster.draining(nodes):
            return f"to be taken away: {', '.join(leaving)}"
        if not self._more or time.monotonic() - self._begun_s < STEADY_S:
            return None
        if self._room is None:
            self._room = self._cluster.request(self._job, self._more)
        return f"there is room for {self._size + self._more} workers" if self._room.is_there() else None

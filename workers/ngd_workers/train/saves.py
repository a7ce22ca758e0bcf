"""Checkpoints of all ranks together, written while training goes on: rank 0 commits and chooses.

Each rank writes its files in a thread of its own, and rank 0's commits the checkpoint when it finds the sums of all of
them: no collective leaves the thread that trains. At the next checkpoint, or at the end, all ranks hear how it went.
"""

import logging
import threading
import time
from typing import Any

from torch import Tensor

from ngd_workers.contract.errors import StorageError, SupersededError, WorkerError
from ngd_workers.contract.events import CheckpointFailed, CheckpointSaved
from ngd_workers.train.checkpoints import Checkpoints, Snapshot
from ngd_workers.train.context import TrainContext

__all__ = ["Saves", "in_host_memory"]

log = logging.getLogger(__name__)

LAST_CHECKPOINT_S = 60.0  # for all tries: the last checkpoint is the result
OTHER_RANKS_S = 600.0  # to write their files
CLOSING_S = 10.0  # for a checkpoint under way when training has failed
AGAIN_S = 0.5


def in_host_memory(value: Any) -> Any:
    """Returns a copy of nested dictionaries, lists and tuples whose tensors are copies in host memory."""
    match value:
        case Tensor():
            return value.detach().to("cpu", copy=True).contiguous()
        case dict():
            return {key: in_host_memory(item) for key, item in value.items()}
        case list():
            return [in_host_memory(item) for item in value]
        case tuple():
            return tuple(in_host_memory(item) for item in value)
    return value


class Saves:
    """The checkpoints of one attempt. Every method but `close` is collective."""

    def __init__(self, context: TrainContext, keep: int) -> None:
        self._context = context
        self._checkpoints = Checkpoints(context.run_dir / "checkpoints", context.attempt, keep)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._is_closing = threading.Event()

    def newest(self) -> tuple[dict[str, Tensor] | None, list[Any]] | None:
        """Returns weights and states of the newest whole checkpoint, which rank 0 chooses for all; None: there is none.

        Raises: StorageError.
        """
        comm, chosen, failure = self._context.comm, 0, None
        if comm.rank == 0:
            try:
                chosen = self._checkpoints.newest_step()
            except StorageError as error:
                failure = error
        chosen, failure = comm.all_gather_object("checkpoint to resume from", (chosen, failure))[0]
        if failure is not None:
            raise failure
        return self._checkpoints.load(chosen, self._context.device) if chosen else None

    def save(self, step: int, snapshot: Snapshot, *, is_result: bool) -> None:
        """Returns once the checkpoint is being written, and the one before is complete; the result when it is complete.

        snapshot: this rank's part. If a checkpoint can't be written, training reports that and goes on; the result of
        the job has to be written. Raises: SupersededError, StorageError.
        """
        deadline_s = time.monotonic() + LAST_CHECKPOINT_S
        while True:
            self._begin(step, snapshot)
            if not is_result:
                return
            failure = self._agreed(self._ended())
            if failure is None:
                return
            is_late = self._context.comm.all_gather_object("last try", time.monotonic() >= deadline_s)[0]
            if is_late or not isinstance(failure, StorageError):
                raise failure
            time.sleep(AGAIN_S)

    def finish(self) -> None:
        """Returns when the checkpoint under way, if there is one, has ended. Raises: SupersededError."""
        failure = self._agreed(self._ended())
        if isinstance(failure, SupersededError):
            raise failure

    def close(self) -> None:
        """Gives a checkpoint under way some seconds: training has failed, on this rank or on another."""
        if self._thread is not None:
            self._thread.join(CLOSING_S)
            self._is_closing.set()

    def _begin(self, step: int, snapshot: Snapshot) -> None:
        """Begins the checkpoint after the end of the one before. Raises: SupersededError."""
        before, failure = self._ended(), None
        if self._context.comm.rank == 0 and not isinstance(before, SupersededError):
            try:
                self._checkpoints.begin(step)
            except WorkerError as error:
                failure = error
                self._report_failure(step, error)
        before, failure = self._context.comm.all_gather_object("checkpoint begun", (before, failure))[0]
        superseded = next((error for error in (before, failure) if isinstance(error, SupersededError)), None)
        if superseded is not None:
            raise superseded
        if failure is not None:
            self._failure = failure
        elif self._context.comm.rank < snapshot.num_ranks:
            self._thread = threading.Thread(
                target=self._write, args=(step, snapshot), name=f"checkpoint of step {step}", daemon=True
            )
            self._thread.start()

    def _ended(self) -> Exception | None:
        """Returns the failure of this rank's last writing, once that has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    def _agreed(self, failure: Exception | None) -> Exception | None:
        """Returns rank 0's failure: it knows of those of the others."""
        of_rank_0: Exception | None = self._context.comm.all_gather_object("checkpoint written", failure)[0]
        return of_rank_0

    def _write(self, step: int, snapshot: Snapshot) -> None:
        rank, began_s = self._context.comm.rank, time.monotonic()
        try:
            self._checkpoints.write(step, rank, snapshot)
            if rank == 0:
                self._commit(step, snapshot, began_s)
        except Exception as error:  # noqa: BLE001 - the outermost frame of the thread
            self._failure = error
            if rank == 0:
                self._report_failure(step, error)
                self._checkpoints.abandon(step)

    def _commit(self, step: int, snapshot: Snapshot, began_s: float) -> None:
        reporter = self._context.reporter
        reporter.flush()  # an attempt after a crash resumes here, and does not report the earlier steps
        manifest = self._checkpoints.commit(
            step,
            snapshot,
            world_size=self._context.comm.world_size,
            gives_up=lambda: self._is_closing.is_set() or time.monotonic() - began_s > OTHER_RANKS_S,
        )
        path = self._checkpoints.path(step).relative_to(self._context.run_dir)
        reporter.report(CheckpointSaved(step=step, path=str(path), bytes=manifest.bytes))

    def _report_failure(self, step: int, error: Exception) -> None:
        if isinstance(error, SupersededError):
            log.warning("%s", error)
            return
        log.error("%s", error)
        self._context.reporter.report(CheckpointFailed(step=step, message=str(error)))

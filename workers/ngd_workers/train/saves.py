"""Checkpoints of all ranks together: rank 0 writes and chooses, and every rank knows how it went."""

import logging
from typing import Any

from ngd_workers.contract.errors import StorageError, SupersededError, WorkerError
from ngd_workers.contract.events import CheckpointFailed, CheckpointSaved
from ngd_workers.contract.patience import insist
from ngd_workers.train.checkpoints import Checkpoints, Manifest
from ngd_workers.train.context import TrainContext

__all__ = ["Saves"]

log = logging.getLogger(__name__)

LAST_CHECKPOINT_S = 60.0  # for all tries: the last checkpoint is the result


class Saves:
    """The checkpoints of one attempt. Every method is collective."""

    def __init__(self, context: TrainContext, keep: int) -> None:
        self._context = context
        self._checkpoints = Checkpoints(context.run_dir / "checkpoints", context.attempt, keep)

    def newest(self) -> dict[str, Any] | None:
        """Returns the newest whole state, which rank 0 chooses for all ranks; None: there is none.

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

    def save(self, step: int, state: dict[str, Any], *, is_result: bool) -> None:
        """Returns when the checkpoint is complete. state: the same on every rank; rank 0 writes its own.

        If a checkpoint can't be written, training reports that and goes on; the result of the job has to be written.
        Raises: SupersededError, StorageError.
        """
        failure: WorkerError | None = None
        if self._context.comm.rank == 0:
            failure = self._write(step, state, is_result)
        failure = self._context.comm.all_gather_object("checkpoint written", failure)[0]
        if failure is not None:
            raise failure

    def _write(self, step: int, state: dict[str, Any], is_result: bool) -> WorkerError | None:
        reporter, world_size = self._context.reporter, self._context.comm.world_size
        reporter.flush()  # an attempt after a crash resumes here, and does not report the earlier steps

        def save() -> Manifest:
            return self._checkpoints.save(step, state, world_size=world_size)

        try:
            manifest = insist(save, "save the last step", patience_s=LAST_CHECKPOINT_S) if is_result else save()
        except SupersededError as error:
            log.warning("%s", error)
            return error
        except StorageError as error:
            log.error("%s", error)
            reporter.report(CheckpointFailed(step=step, message=str(error)))
            return error if is_result else None
        path = self._checkpoints.path(manifest.step).relative_to(self._context.run_dir)
        reporter.report(CheckpointSaved(step=manifest.step, path=str(path), bytes=manifest.bytes))
        return None

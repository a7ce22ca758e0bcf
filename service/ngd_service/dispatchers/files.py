"""The attempts' folders as a controller sees them: on its own disk, or on a volume that it shares with the workers.

What an attempt is told (spec, facts, the request to stop) and what it leaves (events, log, outcome) are files, wherever
it runs; so they survive a lost controller, a lost Ray head and a deleted pod alike.
"""

import errno
import logging
import shlex
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ngd_service.dispatchers.archives import Archives
from ngd_service.dispatchers.base import AttemptRef, BackendRefusedError, DispatchError, Launch
from ngd_service.dispatchers.log_file import LogFile
from ngd_service.errors import InvalidSpecError
from ngd_service.validation import refuse_image, refuse_secrets, refuse_unlisted
from ngd_workers.contract.events import Numbered, numbered
from ngd_workers.contract.rundir import AttemptDir, Facts, Outcome, read_json, write_json
from ngd_workers.contract.spec import AnySpec
from ngd_workers.contract.spec_problems import SpecProblemsError, parse_spec

__all__ = ["FINAL", "AttemptFiles", "age_s", "entrypoint"]

FINAL = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR})

log = logging.getLogger(__name__)

BATCH_EVENTS = 512
OUTCOME_DELAY_S = 90.0  # NFS may show a new file this late: by default it looks at a folder again after 60 s


class AttemptFiles:
    """Writes and reads the folders of attempts below runs_dir; the drivers see the same paths.

    cluster: "own" if a driver starts a Ray of its own, "given" if it finds one where it runs.
    """

    def __init__(
        self,
        *,
        runs_dir: Path,
        data_dir: Path | None,
        worker_url: str,
        cluster: Literal["own", "given"],
        function_modules: Collection[str] | None = None,
        secrets_dir: Path | None = None,
        takes_images: bool = False,
    ) -> None:
        self.archives = Archives(runs_dir)
        self._runs_dir = runs_dir
        self._data_dir = data_dir
        self._worker_url = worker_url
        self._cluster = cluster
        self._function_modules = function_modules
        self._secrets_dir = secrets_dir
        self._takes_images = takes_images

    def folder(self, ref: AttemptRef) -> AttemptDir:
        return AttemptDir.of(self._runs_dir / ref.job_id, ref.number)

    def checkpoints(self, job_id: str) -> Path:
        """Returns the folder of the job's checkpoints; it may not be there yet."""
        return self._runs_dir / job_id / "checkpoints"

    def prepare(self, launch: Launch) -> AttemptDir:
        """Returns the attempt's folder with all that its driver reads; may be called again. Raises: DispatchError."""
        folder = self.folder(launch.ref)
        try:
            spec = parse_spec(launch.spec)
        except SpecProblemsError as error:
            raise DispatchError(f"this version does not take the stored spec: {error}; submit it again") from error
        try:
            refuse_unlisted(spec, self._function_modules)  # the list may be younger than the job
            refuse_secrets(spec, self._secrets_dir)
            refuse_image(spec, is_taken=self._takes_images)
        except InvalidSpecError as error:
            raise DispatchError(error.detail) from error
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.spec, spec)
            write_json(folder.facts, self._facts(launch, spec))
        except OSError as error:
            sentence = f"can't write {folder.path}: {error.strerror}; check NGD_HOME, or NGD_RUNS_DIR if it is set"
            # A full disk or a stale handle passes; a folder that is not this user's does not.
            raise (DispatchError if error.errno in FINAL else BackendRefusedError)(sentence) from error
        return folder

    def announce(self, ref: AttemptRef) -> None:
        """Tells a driver that an earlier controller started where this one listens; tried again at the next look."""
        folder = self.folder(ref)
        try:
            facts = read_json(folder.facts, Facts)
            if facts is not None and facts.url != self._worker_url:
                write_json(folder.facts, facts.model_copy(update={"url": self._worker_url}))
        except (OSError, ValidationError) as error:
            log.warning("not_announced path=%s error=%s", folder.facts, error)

    def ask_to_stop(self, ref: AttemptRef) -> None:
        """Asks the workers to stop after the current step, also those that a late submission will yet start.

        A volume that can't be written is logged: there are other ways to end an attempt.
        """
        self._touch(self.folder(ref).stop)

    def fence(self, ref: AttemptRef) -> None:
        """Forbids the attempt to commit checkpoints: the next attempt resumes from none that its remains may write.

        A volume that can't be written is logged: the attempt's processes are ended besides.
        """
        self._touch(self.folder(ref).ended)

    def _touch(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            log.warning("not_written path=%s error=%s", path, error)

    def outcome(self, ref: AttemptRef) -> Outcome | None:
        """Returns how the attempt ended; a file that makes no sense counts as none, so that the job goes on.

        Raises: BackendRefusedError if it can't be read now: a job that has ended must not be run once more for that.
        """
        folder = self.folder(ref)
        try:
            return folder.read_outcome()
        except OSError as error:
            raise _unreadable(folder.outcome, error) from error
        except ValidationError as error:
            log.error("outcome_unreadable path=%s error=%s", folder.outcome, error)
            return None

    def may_still_show(self, ended_at: datetime | None) -> bool:
        """Returns whether a driver that ended then by itself may have written an outcome that is not seen here yet."""
        return ended_at is not None and time.time() - ended_at.timestamp() < OUTCOME_DELAY_S

    def undelivered(self, ref: AttemptRef, after_seq: int) -> Iterator[list[Numbered]]:
        """Yields the attempt's own record of its events after `after_seq`, in batches. Raises: BackendRefusedError."""
        batch: list[Numbered] = []
        for event in _spooled(self.folder(ref).spool):
            if event.seq > after_seq:
                batch.append(event)
            if len(batch) == BATCH_EVENTS:
                yield batch
                batch = []
        if batch:
            yield batch

    def log(self, ref: AttemptRef, rank: int | None = None) -> LogFile:
        """Returns the output of the attempt's processes, or of one rank; it may not be there yet."""
        folder = self.folder(ref)
        return LogFile(folder.log if rank is None else folder.rank_log(rank))

    def bound_logs(self, ref: AttemptRef, max_bytes: int) -> None:
        """Drops the oldest part of logs that have grown too long; a volume that refuses is logged."""
        try:
            for path in self.folder(ref).logs():
                LogFile(path).keep(max_bytes)
        except OSError as error:
            log.warning("log_not_bounded attempt=%s error=%s", ref.attempt_id, error)

    def _facts(self, launch: Launch, spec: AnySpec) -> Facts:
        sha256 = None if spec.code is None else spec.code.sha256
        return Facts(
            attempt_id=launch.ref.attempt_id,
            attempt=launch.ref.number,
            job_id=launch.ref.job_id,
            url=self._worker_url,
            token=launch.token,
            run_dir=self._runs_dir / launch.ref.job_id,
            data_dir=self._data_dir,
            cluster=self._cluster,
            code=None if sha256 is None else self.archives.path(sha256),
            secrets_dir=self._secrets_dir,
        )


def age_s(path: Path) -> float:
    """Returns the seconds since the file was written; the clock is the file's machine's."""
    return time.time() - path.stat().st_mtime


def entrypoint(command: Sequence[str], folder: AttemptDir) -> str:
    """Returns the shell command of a driver whose output is the attempt's log, for those who run it elsewhere.

    It stays the same however often it is split into words and joined again.
    """
    run = shlex.join([*command, str(folder.path)])
    return shlex.join(["sh", "-c", f"exec {run} >>{shlex.quote(str(folder.log))} 2>&1"])


def _spooled(path: Path) -> Iterator[Numbered]:
    """Yields the spool's complete lines; the last one is torn if its writer was killed."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield numbered.validate_json(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValidationError as error:
        log.error("spool_unreadable path=%s error=%s", path, error)


def _unreadable(path: Path, error: OSError) -> BackendRefusedError:
    return BackendRefusedError(f"can't read {path}: {error.strerror}; the job goes on when that can be read again")

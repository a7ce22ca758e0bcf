"""Attempts as processes of this machine, each in a session of its own, so that they outlive the controller.

A driver is found again by its pid and start time; if the controller died between starting it and noting its pid, by
the last word of its command line, which is the attempt's own folder.
"""

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, Self

import psutil
from pydantic import BaseModel, Field

from ngd_service.dispatchers.base import (
    AttemptRef,
    BackendRefusedError,
    Dispatcher,
    DispatchError,
    Launch,
    NoSettings,
    Seen,
    exit_words,
)
from ngd_service.dispatchers.files import FINAL, AttemptFiles, age_s
from ngd_service.dispatchers.processes import end_all, mark
from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Process
from ngd_workers.contract.rundir import AttemptDir, read_json, write_json

__all__ = ["LocalDispatcher"]

log = logging.getLogger(__name__)

START_TIME_TOLERANCE_S = 2.0  # the kernel's clock of start times moves a little when the wall clock is corrected
LAST_THREADS_S = 5.0  # a process is a zombie, and can't be waited for yet, until its last thread has ended
LINGER_S = 30.0  # for a driver that has written its outcome to leave by itself


class DriverProcess(BaseModel):
    """process.json: which process the driver is. A pid alone may be another process's by now."""

    pid: int
    started_at_s: float
    machine: str = Field("", description="Boot and pid namespace in which the pid counts.")

    @classmethod
    def of(cls, process: psutil.Process) -> "DriverProcess":
        return cls(pid=process.pid, started_at_s=process.create_time(), machine=_machine())


class LocalDispatcher(Dispatcher[NoSettings]):
    """Starts `command ATTEMPT_DIR` on this machine."""

    owns_processes = True
    ray: ClassVar[Literal["own", "given"]] = "own"

    def __init__(self, files: AttemptFiles, *, command: Sequence[str], failpoint: Failpoint) -> None:
        self._files = files
        self._command = tuple(command)
        self._failpoint = failpoint
        self._children: dict[AttemptRef, subprocess.Popen[bytes]] = {}  # waited for, or they would stay as zombies
        self._statuses: dict[AttemptRef, int] = {}  # of drivers that this controller has started, and that have ended

    @classmethod
    def of(cls, settings: NoSettings, files: AttemptFiles, *, command: Sequence[str], failpoint: Failpoint) -> Self:
        return cls(files, command=command, failpoint=failpoint)

    def submit(self, launch: Launch) -> None:
        if self._files.folder(launch.ref).path.exists() and self.inspect(launch.ref).process is not Process.UNKNOWN:
            return
        folder = self._files.prepare(launch)
        try:
            self._start(launch.ref, folder)
        except OSError as error:
            sentence = f"can't start {self._command[0]} in {folder.path}: {error.strerror}"
            # A full disk or too many processes pass; a command that is not there does not.
            raise (DispatchError if error.errno in FINAL else BackendRefusedError)(sentence) from error

    def inspect(self, ref: AttemptRef) -> Seen:
        folder = self._files.folder(ref)
        driver = self._driver(folder)
        outcome = self._files.outcome(ref)
        if driver is not None and outcome is not None and age_s(folder.outcome) > LINGER_S:
            log.warning("driver_lingers attempt=%s pid=%s", ref.attempt_id, driver.pid)
            self.kill(ref)
            driver = None
        if driver is not None:
            self._files.announce(ref)
            return Seen(Process.RUNNING)
        was_started = outcome is not None or folder.process.exists()
        if not was_started:
            return Seen(Process.UNKNOWN, outcome)
        return Seen(Process.EXITED, outcome, self._ended_how(ref) if outcome is None else None)

    def interrupt(self, ref: AttemptRef) -> None:
        driver = self._driver(self._files.folder(ref))
        if driver is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                driver.send_signal(signal.SIGINT)

    def kill(self, ref: AttemptRef) -> None:
        """Returns when none of the attempt's processes is left, so that nothing more is written by them."""
        folder = self._files.folder(ref)
        driver = self._driver(folder)
        noted = read_json(folder.process, DriverProcess)
        has_group = noted is not None and (driver is not None or _has_its_group(noted))
        left = end_all(ref.attempt_id, noted.pid if noted and has_group else None)
        self._reap()
        self._statuses.pop(ref, None)
        if left:
            raise BackendRefusedError(
                f"processes {', '.join(map(str, left))} of attempt {ref.number} live on after SIGKILL; they wait for a "
                "device or a volume: see to it, and they end"
            )

    def _start(self, ref: AttemptRef, folder: AttemptDir) -> None:
        with folder.log.open("ab") as output:
            child = subprocess.Popen(
                [*self._command, str(folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | mark(ref.attempt_id),
            )
        self._children[ref] = child
        self._failpoint.reach("after_spawn")
        self._note(folder, psutil.Process(child.pid))

    def _note(self, folder: AttemptDir, driver: psutil.Process) -> None:
        try:
            write_json(folder.process, DriverProcess.of(driver))
        except OSError as error:  # it runs, and is found by its folder until this can be written
            log.warning("process_not_noted path=%s error=%s", folder.process, error)

    def _driver(self, folder: AttemptDir) -> psutil.Process | None:
        """Returns the driver if it lives."""
        self._reap()
        noted = read_json(folder.process, DriverProcess)
        if noted is not None:
            return _living(noted)
        if not folder.path.exists():
            return None
        driver = _find(folder.path)
        if driver is not None:
            self._note(folder, driver)
        return driver

    def _ended_how(self, ref: AttemptRef) -> str | None:
        """Returns how the driver ended in words, None if another controller had started it."""
        if (child := self._children.get(ref)) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LAST_THREADS_S)
            self._reap()
        status = self._statuses.get(ref)
        return None if status is None else f"the driver {exit_words(status)}"

    def _reap(self) -> None:
        for ref, child in list(self._children.items()):
            if child.poll() is not None:
                self._statuses[ref] = child.returncode
                del self._children[ref]


def _living(noted: DriverProcess) -> psutil.Process | None:
    try:
        process = psutil.Process(noted.pid)
        return process if _is_same(process, noted) and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _is_same(process: psutil.Process, noted: DriverProcess) -> bool:
    return abs(process.create_time() - noted.started_at_s) < START_TIME_TOLERANCE_S


def _has_its_group(noted: DriverProcess) -> bool:
    """Returns whether the group of the driver's number, if there is one, is still the driver's.

    While any member lives the kernel gives the number to no new process: one that has it and is not the driver, which
    may be a zombie by now, means that the group is gone. After a boot any group may have the number.
    """
    if noted.machine != _machine():
        return False
    try:
        return _is_same(psutil.Process(noted.pid), noted)
    except psutil.NoSuchProcess:
        return True


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{psutil.boot_time():.0f}"


def _find(folder: Path) -> psutil.Process | None:
    """Returns the oldest process whose command line ends in the folder: the driver; its forks are younger."""
    drivers = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if process.info["cmdline"] and process.info["cmdline"][-1] == str(folder)
    ]
    return min(drivers, key=lambda process: float(process.info["create_time"]), default=None)

"""The processes of an attempt on this machine: all that carry its mark in their environment, and their children.

Ray puts its workers into process groups of their own, and a process may leave its session: the environment stays.
"""

import os
import time

import psutil

__all__ = ["end_all", "mark"]

MARK = "NGD_ATTEMPT"
KILL_S = 10.0  # a process that outlives SIGKILL for so long waits for a disk
LOOK_S = 0.02


def mark(attempt_id: str) -> dict[str, str]:
    """Returns the variables to add to the environment of an attempt's first process."""
    # setproctitle, which Ray calls in its processes, would write their titles over the environment.
    return {MARK: attempt_id, "SPT_NOENV": "1"}


def end_all(attempt_id: str, group: int | None) -> list[int]:
    """Kills the attempt's processes until there are none. Returns the pids of those that could not be ended.

    group: a process group that is the attempt's too.
    """
    deadline_s = time.monotonic() + KILL_S
    while living := _members(attempt_id, group):
        for process in living:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if time.monotonic() >= deadline_s:
            return sorted(process.pid for process in living)
        time.sleep(LOOK_S)  # one that was just being started is seen in the next round
    return []


def _members(attempt_id: str, group: int | None) -> list[psutil.Process]:
    living = {
        process.pid: process
        for process in psutil.process_iter(["ppid", "status"])
        if process.info["status"] not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) and process.pid != os.getpid()
    }
    members = {pid for pid, process in living.items() if _is_marked(process, attempt_id) or _is_in(pid, group)}
    below = members
    while below := {pid for pid, process in living.items() if process.info["ppid"] in below} - members:
        members |= below
    return [living[pid] for pid in members]


def _is_marked(process: psutil.Process, attempt_id: str) -> bool:
    try:
        return process.environ().get(MARK) == attempt_id
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


def _is_in(pid: int, group: int | None) -> bool:
    try:
        return group is not None and os.getpgid(pid) == group
    except ProcessLookupError:
        return False

"""Ranks that come to a true end of the interpreter. START HERE: `run_ways_out`.

A process that has imported torch once forks them, so that a start costs a fraction of a second; each rank then leaves
by the end of the script, and not by the `os._exit` of multiprocessing, which finalizes nothing.
"""

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.errors import CollectiveError
from tests.support import ROOT
from tests.support.ranks import free_port

BELL = 90  # a file descriptor
HOLD = 30_000_000  # numbers to add up: about half a second
# Gloo sometimes misses that a peer has died just before an exchange: the group's timeout ends that, not the death.
TIMEOUT = timedelta(seconds=20)

# What runs last at the exit of rank 1, straight from C: it tells rank 0, and then keeps the interpreter to itself until
# the interpreter is being finalized. A thread of gloo whose exchange rank 0 completes meanwhile waits for the
# interpreter, and is thrown out of it: what happens on a busy machine now and then happens each time.
SCRIPT = f"""
import atexit, os
atexit.register(sum, range({HOLD}))
atexit.register(os.write, {BELL}, b"!")
from tests.support.ways_out import main
main()
"""


def run_ways_out(times: Mapping[str, int], timeout_s: float) -> list[dict[str, Any]]:
    """Returns how each pair of ranks ended: its way, the ranks' exit statuses (negative: a signal), their stderr."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(dict(times))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return [json.loads(line) for line in ended.stdout.splitlines()]


def gloo_threads() -> list[str]:
    """Returns the names of this process's threads that are gloo's and stay."""
    for _ in range(100):  # a thread that was joined is listed for a moment
        names = [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := _name(task))]
        if not names:
            break
        time.sleep(0.02)
    return names


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it has just ended
        return ""


class Pair:
    """What two ranks of one group share beside it."""

    def __init__(self, rank: int, reader: int) -> None:
        self.rank = rank
        self.reader = reader


def leave_an_exchange(pair: Pair) -> None:
    """Begins an exchange on rank 1, which rank 0 joins when rank 1 is being finalized: too late."""
    aside = Communicator().aside()
    kept["parts"] = parts = [torch.ones(64), torch.ones(64)]

    def begin() -> Pending[list[torch.Tensor]]:
        return aside.begin_exchange("left behind", parts, [64, 64], kind="A")

    if pair.rank == 1:
        begin()
        return
    os.close(BELL)
    os.read(pair.reader, 1)
    with suppress(CollectiveError):
        begin().wait()


def train_a_little(pair: Pair) -> None:
    """Takes two steps whose statistics are exchanged aside, and leaves all of it to the end of the process."""
    from ngd_dist import NGD, NGDConfig

    torch.manual_seed(pair.rank)
    model = torch.nn.Linear(4, 3)
    optimizer = NGD(model, NGDConfig(lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def returns(pair: Pair) -> None:
    train_a_little(pair)


def destroys(pair: Pair) -> None:
    train_a_little(pair)
    dist.destroy_process_group()


def raises(pair: Pair) -> None:
    leave_an_exchange(pair)
    raise RuntimeError("an error of the script")


def exits(pair: Pair) -> None:
    leave_an_exchange(pair)
    sys.exit(3)


def is_told_to_stop(pair: Pair) -> None:
    if pair.rank == 1:
        leave_an_exchange(pair)
        os.kill(os.getpid(), signal.SIGTERM)
    leave_an_exchange(pair)


WAYS: dict[str, Callable[[Pair], None]] = {
    way.__name__: way for way in (returns, destroys, raises, exits, is_told_to_stop)
}
kept: dict[str, object] = {}  # as a script's globals: alive until the interpreter is finalized


def run_pair(way: str, folder: Path) -> dict[str, Any] | None:
    """Returns how the two ranks ended; None in a rank, which then leaves by the end of the script."""
    port = free_port()
    reader, writer = os.pipe()
    os.dup2(writer, BELL)
    os.close(writer)
    ranks = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            descriptor = os.open(folder / str(rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 2)
            if rank == 0 or way in (returns.__name__, destroys.__name__):
                stay_silent()
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            torch.set_num_threads(1)
            dist.init_process_group("gloo", rank=rank, world_size=2, timeout=TIMEOUT)
            WAYS[way](Pair(rank, reader))
            return None
        ranks.append(pid)
    os.close(reader)
    os.close(BELL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    return {"statuses": [*statuses], "errors": [(folder / str(rank)).read_text()[-2000:] for rank in range(2)]}


def stay_silent() -> None:
    atexit.unregister(sum)
    atexit.unregister(os.write)


def main() -> None:
    for name in ("ngd_dist.optimizer", "torch._dynamo"):  # once for all ranks: torch's optimizers import its compiler
        import_module(name)
    gc.freeze()  # the ranks' own garbage is little
    folder = Path(tempfile.mkdtemp())  # a rank must not remove it at its end
    for way, times in json.loads(sys.argv[1]).items():
        for _ in range(times):
            ended = run_pair(way, folder)
            if ended is None:
                return
            sys.stdout.write(json.dumps({"way": way} | ended) + "\n")
            sys.stdout.flush()
    shutil.rmtree(folder)
    stay_silent()

"""Ranks that come to a true end of the interpreter: ``python -m tests.support.ways_out '{"way": "returns", ...}'``.

A process that has imported torch once forks them, so that a start costs a fraction of a second; each rank then leaves
by the end of this module, as a script does, and not by the `os._exit` of multiprocessing, which finalizes nothing.
Writes a line of JSON for each pair: the exit statuses of its ranks, negative for a signal, and what they wrote.
"""

import atexit
import os

# What a rank calls last, straight from C: it tells the other rank that it is ending, and then keeps the interpreter to
# itself until that is finalized. So a thread of gloo whose exchange the other rank has completed meanwhile finds
# nothing finalized yet, waits for the interpreter, and is thrown out of it, as on a busy machine now and then.
BELL = 90  # a file descriptor
atexit.register(sum, range(60_000_000))
atexit.register(os.write, BELL, b"!")

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from ngd_dist.comm import Communicator, Pending
from ngd_dist.errors import CollectiveError
from tests.support.ranks import free_port


def gloo_threads() -> list[str]:
    """Returns the names of this process's threads that are gloo's."""
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    return sorted(name for name in names if "gloo" in name)


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


def run_pair(way: str, folder: Path) -> dict[str, list[object]] | None:
    """Returns how the two ranks ended; None in a rank, which then leaves by the end of this module."""
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
            if rank == 0:
                stay_silent()
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            torch.set_num_threads(1)
            dist.init_process_group("gloo", rank=rank, world_size=2)
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

    folder = Path(tempfile.mkdtemp())
    for way, times in json.loads(sys.argv[1]).items():
        for _ in range(times):
            ended = run_pair(way, folder)
            if ended is None:
                return
            print(json.dumps({"way": way} | ended), flush=True)
    stay_silent()


if __name__ == "__main__":
    main()

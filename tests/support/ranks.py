"""Runs a function on several ranks of a gloo group, one process each, and brings back what each returned.

`run_ranks` is for ranks that all succeed; `run_survivors` for those of which some die, hang or raise on purpose.
"""

import datetime
import gc
import os
import pickle
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HANG_S = 240.0  # a busy machine takes a minute to start four processes


# torch's optimizers import its compiler: seconds of each process's life, unless its parent has done it before.
PRELOADED = ["torch", "torch._dynamo", "torch.nn.parallel", "torch.testing", "pytest", "ngd_dist.optimizer"]


def _context() -> Any:
    """Returns a context whose processes are forked from one that has imported torch, and run nothing of it."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _entry(
    rank: int,
    world_size: int,
    port: int,
    results: Any,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    timeout_s: float = HANG_S / 2,
    ends_together: bool = True,
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    gc.freeze()  # the end of each training collects garbage: what was imported need not be walked
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
        value = fn(rank, world_size, *args)
        if ends_together:
            dist.barrier()
            dist.destroy_process_group()
        # Pickled here: a queue of torch's would pass file descriptors, which die with this process.
        results.put((rank, True, pickle.dumps(value)))
    except BaseException:  # noqa: BLE001 - the boundary of the child process: everything goes to the parent as text
        results.put((rank, False, traceback.format_exc()))
        results.close()
        results.join_thread()  # else the traceback would be lost with this process
        os._exit(1)  # the peers' sockets close at once, so that they fail too instead of waiting


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns [fn(rank, world_size, *args) for each rank]. fn is a module-level function; its value is pickled.

    Raises: AssertionError with the first failing rank's traceback, or naming the ranks that hang.
    """
    context = _context()
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_entry, args=(rank, world_size, port, results, fn, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    values: dict[int, Any] = {}
    try:
        for _ in range(world_size):
            try:
                rank, ok, value = results.get(timeout=HANG_S)
            except queue.Empty as error:
                missing = sorted(set(range(world_size)) - set(values))
                raise AssertionError(f"ranks {missing} of {world_size} gave no result within {HANG_S} s") from error
            assert ok, f"rank {rank} of {world_size} raised:\n{value}"
            values[rank] = pickle.loads(value)
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [values[rank] for rank in range(world_size)]


def run_survivors(
    world_size: int, fn: Callable[..., Any], *args: Any, doomed: set[int], timeout_s: float
) -> dict[int, Any]:
    """Returns {rank: fn(rank, world_size, *args)} for the ranks that are not `doomed` to die or hang in fn.

    `timeout_s` bounds the group's collectives; no process outlives this call. Raises: AssertionError with the
    traceback of a rank, or if a survivor gives no result within HANG_S.
    """
    context = _context()
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_entry, args=(rank, world_size, port, results, fn, args, timeout_s, False))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    values: dict[int, Any] = {}
    try:
        while set(values) != set(range(world_size)) - doomed:
            rank, ok, value = results.get(timeout=HANG_S)
            assert ok or rank in doomed, f"rank {rank} of {world_size} raised:\n{value}"
            if ok:
                values[rank] = pickle.loads(value)
    except queue.Empty as error:
        raise AssertionError(f"of {world_size} ranks, only {sorted(values)} gave a result in {HANG_S} s") from error
    finally:
        for process in processes:
            process.kill()
            process.join()
    return values

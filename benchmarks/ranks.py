"""Runs a function on several ranks of a gloo group, one process with one thread each."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["on_ranks"]


def on_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Returns [fn(rank, world_size, *args) for each rank]; fn is a function of a module. Raises: as fn does."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_entry, (world_size, folder, fn, args), nprocs=world_size)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _entry(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    torch.save(fn(rank, world_size, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()

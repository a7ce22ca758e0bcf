"""What Ray's worker processes do around the process group that Ray Train makes: variables before it, SIGTERM after."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.launch.signals import resize_in_order

__all__ = ["GroupConfig", "training"]


_training = threading.Event()  # Ray ends the processes of a group that has ended by SIGTERM as well


@contextlib.contextmanager
def training() -> Iterator[None]:
    """SIGTERM to this process asks for another group until the end, and ends the process afterwards."""
    _training.set()
    try:
        yield
    finally:
        _training.clear()


@dataclass
class GroupConfig(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """The process group of an attempt. variables: set before NCCL and gloo look for theirs."""

    attempt_dir: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def backend_cls(self) -> type[Backend]:
        """As Ray Train's, which calls `on_start` before the training function."""
        return _GroupBackend


_TorchBackend: Any = TorchConfig().backend_cls


class _GroupBackend(_TorchBackend):  # type: ignore[misc]  # a class that Ray gives at run time
    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        worker_group.execute(_prepare, backend_config.attempt_dir, dict(backend_config.variables))
        super().on_start(worker_group, backend_config)


def _prepare(attempt_dir: str, variables: Mapping[str, str]) -> None:
    """Runs in the main thread of a worker, where alone a signal can be handled; training has another thread."""
    os.environ.update(variables)
    reason = f"SIGTERM to a worker on {socket.gethostname()}"
    resize_in_order(AttemptDir(Path(attempt_dir)), signal.SIGTERM, reason, _training.is_set)

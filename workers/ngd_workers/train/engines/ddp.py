"""torch's DistributedDataParallel."""

import contextlib

from torch.nn.parallel import DistributedDataParallel

from ngd_workers.train.engines.base import Build, Engine

__all__ = ["DDPEngine"]


class DDPEngine(Engine):
    """Whole weights on every rank; gradients are averaged while backward runs. One rank alone needs no wrapper."""

    talks_in_forward = True
    forward: DistributedDataParallel

    def wrap(self, build: Build) -> None:
        devices = [self._device] if self._device.type == "cuda" else None
        self.forward = DistributedDataParallel(self.model, device_ids=devices)
        self.optimizer = self._build(build, self.forward)

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if is_last else self.forward.no_sync()

    @property
    def gradient_bytes(self) -> dict[str, int]:
        return {"gradients": 2 * self._in_ring()}

"""The model as it is: one rank alone, or NGD, which averages the gradients."""

from ngd_workers.train.engines.base import Build, Engine

__all__ = ["BareEngine"]


class BareEngine(Engine):
    """No wrapper."""

    def wrap(self, build: Build) -> None:
        self.forward, self.optimizer = self.model, self._build(build, self.model)

    @property
    def gradient_bytes(self) -> dict[str, int]:
        return {}

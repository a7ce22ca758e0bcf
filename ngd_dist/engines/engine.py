"""What drives a model in training beside the optimizer."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

__all__ = ["Engine"]


class Engine:
    """A bare or compiled model, which nothing else drives. A subclass says what its wrapper changes.

    averages_gradients: whether gradients are means over ranks once backward has ended, so that NGD sends none.
    averager: who averages them, for `NGD.explain`.
    """

    averages_gradients = False
    averager = "the optimizer"

    def inside(self, model: nn.Module) -> nn.Module | None:
        """Returns the model inside this engine's wrapper; None if the model is no such wrapper."""
        return None

    def check_reduction(self, loss_reduction: str) -> None:
        """Returns if the engine's average fits the loss. Raises: ConfigError."""

    def check_unfrozen(self, count: int) -> None:
        """Returns if so many parameters may be unfrozen under a wrapper that was built before. Raises: ConfigError."""

    def check_foreign(self, count: int) -> None:
        """Returns if so many parameters may be updated that are not of the model. Raises: ConfigError."""

    def at_rest(self) -> AbstractContextManager[object]:
        """Returns a context in which forward passes through any wrapper of this engine begin no iteration."""
        return nullcontext()

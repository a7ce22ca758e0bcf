"""The contract of an engine, which drives a model in training beside the optimizer."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

__all__ = ["Engine"]


class Engine:
    """The engine of a bare or compiled model; it does nothing. A subclass overrides the methods that its wrapper needs.

    averages_gradients: whether gradients are means over ranks once backward has ended, so that NGD sends none.
    averager: the name of the part that averages them, for `NGD.explain`.
    """

    averages_gradients = False
    averager = "the optimizer"

    def inside(self, model: nn.Module) -> nn.Module | None:
        """Returns the model inside this engine's wrapper; None if the model is no such wrapper."""
        return None

    def check_reduction(self, loss_reduction: str) -> None:
        """Returns if the engine's average fits the loss. Raises: ConfigError."""

    def check_unfrozen(self, count: int) -> None:
        """Returns if `count` parameters may be unfrozen after the wrapper was built. Raises: ConfigError."""

    def check_foreign(self, count: int) -> None:
        """Returns if `count` parameters outside the model may be updated. Raises: ConfigError."""

    def at_rest(self) -> AbstractContextManager[object]:
        """Returns a context in which forward passes through any wrapper of this engine begin no iteration."""
        return nullcontext()

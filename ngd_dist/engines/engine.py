"""The contract of an engine, which drives a model in training beside the optimizer."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from ngd_dist.config import NGDConfig

__all__ = ["Engine", "Piece"]


class Piece(NamedTuple):
    """This rank's range of one flattened parameter: it begins at `start`, and may be empty.

    gradient, weight: [length] views of the engine's own tensors; to write into them is to change the engine's. gradient
    is the mean over ranks, without a loss scale; None if there is none. weight may have a wider dtype than the model's.
    """

    start: int
    gradient: Tensor | None
    weight: Tensor


class Engine:
    """The engine of a bare or compiled model; it does nothing. A subclass overrides the methods that its wrapper needs.

    averages_gradients: whether gradients are means over ranks once backward has ended, so that NGD sends none.
    averager: the name of the part that averages them, for `NGD.explain`.
    is_sharded: whether a rank has pieces of the mean gradients, and not the whole of each in `grad`.
    keeps_gradients: whether gradients stay in `grad` until the step, so that an empty `grad` was cleared by the loop.
    swaps_parameters: whether the parameters that a module holds while it runs are others than those of the optimizer.
    steps_itself: whether the loop calls the engine's own step, which calls the optimizer's.
    """

    averages_gradients = False
    averager = "the optimizer"
    is_sharded = False
    keeps_gradients = True
    swaps_parameters = False
    steps_itself = False

    def inside(self, model: nn.Module) -> nn.Module | None:
        """Returns the model inside this engine's wrapper; None if the model is no such wrapper."""
        return None

    def drives(self, model: nn.Module) -> bool:
        """Returns whether this engine drives a model that has no wrapper."""
        return False

    def bound(self, model: nn.Module) -> "Engine":
        """Returns the engine of this very model, which `inside` or `drives` has recognised. Raises: ConfigError."""
        return self

    def owned(self, parameter: nn.Parameter) -> str | None:
        """Returns the way out if the parameter shows that an engine of this kind owns it; None if nothing shows."""
        return None

    def class_of(self, module: nn.Module) -> type[nn.Module] | None:
        """Returns the class that the module had before this engine gave it another; None if it did not."""
        return None

    def fitted(self, config: NGDConfig) -> NGDConfig:
        """Returns the settings with those filled in that the engine decides. Raises: ConfigError if some don't fit."""
        return config

    def check_ranks(self, model: nn.Module, rank: int, world_size: int) -> None:
        """Returns if the engine averages over exactly these ranks. Raises: ConfigError."""

    def check_reduction(self, loss_reduction: str) -> None:
        """Returns if the engine's average fits the loss. Raises: ConfigError."""

    def check_unfrozen(self, count: int) -> None:
        """Returns if `count` parameters may be unfrozen after the wrapper was built. Raises: ConfigError."""

    def check_foreign(self, count: int) -> None:
        """Returns if `count` parameters outside the model may be updated. Raises: ConfigError."""

    def whole_shapes(self, model: nn.Module) -> AbstractContextManager[object]:
        """Returns a context in which each parameter has its whole shape, maybe without its numbers."""
        return nullcontext()

    def pieces(self, parameters: Iterable[nn.Parameter]) -> Mapping[nn.Parameter, Piece]:
        """Returns this rank's pieces, of an engine that is sharded; parameters without one are left out.

        Their ranges never change. Gradients are valid from the end of backward, or from the engine's own step, on.
        """
        raise NotImplementedError

    def loss_scale(self) -> float:
        """Returns the factor that the engine puts on the next loss."""
        return 1.0

    def beside(self, outputs: Iterable[Tensor]) -> AbstractContextManager[object]:
        """Returns a context in which backward passes from the tensors that the model returned are none of training.

        Raises: ConfigError if the engine can't tell them from those of training.
        """
        return nullcontext()

    def attach(self, step: Callable[[], None], *, is_update: bool) -> None:
        """Has an engine that steps itself call `step`: before its own optimizer's or, if `is_update`, in its place."""

    def check_step(self) -> None:
        """Returns if the optimizer may be stepped now. Raises: ConfigError if the engine's own step is to do it."""

    def lr(self, group: Mapping[str, Any]) -> float:
        """Returns the lr with which a param group's directions will be applied, when they are not by NGD."""
        return float(group["lr"])

    def at_rest(self) -> AbstractContextManager[object]:
        """Returns a context in which forward passes through any wrapper of this engine begin no iteration."""
        return nullcontext()

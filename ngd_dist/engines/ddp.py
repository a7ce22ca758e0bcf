"""torch's DistributedDataParallel, which averages gradients over ranks while backward runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist.engines.engine import Engine
from ngd_dist.errors import ConfigError

__all__ = ["DDP"]

# Without these, an evaluation inside DDP would count as an iteration of training, broadcast buffers and keep the next
# forward pass from broadcasting them. The search for unused parameters inserts an operation without forward mode.
AT_REST = {
    "require_backward_grad_sync": False,
    "require_forward_param_sync": False,
    "find_unused_parameters": False,
}


class DDP(Engine):
    """The model of a DistributedDataParallel."""

    averages_gradients = True
    averager = "DistributedDataParallel"

    def inside(self, model: nn.Module) -> nn.Module | None:
        return model.module if isinstance(model, DistributedDataParallel) else None

    def check_reduction(self, loss_reduction: str) -> None:
        if loss_reduction == "sum":
            raise ConfigError("loss_reduction 'sum' needs the bare model: DDP divides the sum by the number of ranks")

    def check_unfrozen(self, count: int) -> None:
        raise ConfigError(
            f"DDP averages only parameters that were trainable when it was built, and {count} were not; after "
            "unfreezing wrap the model again, and build a new NGD"
        )

    def check_foreign(self, count: int) -> None:
        raise ConfigError(f"DDP averages its model's gradients alone: {count} in param_groups are not of the model")

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Keeps wrappers from expecting gradients, in the one place that every wrapper has in common.

        Only the objective may know the wrapper. A global module hook would see it too, but torch.compile warns about
        such hooks.
        """
        forward: Callable[..., Any] = DistributedDataParallel.forward

        def at_rest(ddp: DistributedDataParallel, *inputs: Any, **kwargs: Any) -> Any:
            settings = vars(ddp)
            before = {name: settings[name] for name in AT_REST}
            settings.update(AT_REST)
            try:
                return forward(ddp, *inputs, **kwargs)
            finally:
                settings.update(before)

        DistributedDataParallel.forward = at_rest  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            DistributedDataParallel.forward = forward  # type: ignore[method-assign]

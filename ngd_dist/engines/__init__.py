"""The engines that may wrap a model: they may average gradients, and must rest while the loss is evaluated again.

An engine is one file with a subclass of `Engine`, and one entry of `ENGINES`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ngd_dist.engines.ddp import DDP
from ngd_dist.engines.engine import Engine
from ngd_dist.engines.unsupported import check_whole
from ngd_dist.errors import ConfigError

__all__ = ["ENGINES", "Engine", "all_at_rest", "check_whole", "unwrap"]

ENGINES: list[Engine] = [DDP()]


def unwrap(model: nn.Module) -> tuple[Engine, nn.Module]:
    """Returns the engine that drives the model, and the model inside all wrappers, torch.compile's among them.

    Raises: ConfigError for nn.DataParallel.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"NGD takes the model itself, got {type(model).__name__}; parameters go into param_groups=[...]"
        )
    engine = Engine()
    while True:
        if isinstance(model, nn.DataParallel):
            raise ConfigError(
                "NGD can't see into nn.DataParallel's copies; use DistributedDataParallel or the bare model"
            )
        inner = getattr(model, "_orig_mod", None)
        for candidate in ENGINES:
            wrapped = candidate.inside(model)
            if wrapped is not None:
                engine, inner = candidate, wrapped
        if not isinstance(inner, nn.Module):
            return engine, model
        model = inner


@contextmanager
def all_at_rest() -> Iterator[None]:
    """Keeps every engine from counting an evaluation of the loss as an iteration of training."""
    with ExitStack() as stack:
        for engine in ENGINES:
            stack.enter_context(engine.at_rest())
        yield

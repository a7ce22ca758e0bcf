"""The engines that may drive a model: they may average gradients, and own pieces of parameters.

An engine is one file with a subclass of `Engine`, and one entry of `ENGINES`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ngd_dist.engines.ddp import DDP
from ngd_dist.engines.deepspeed import DeepSpeed, Inner
from ngd_dist.engines.engine import Engine, Piece
from ngd_dist.engines.fsdp import FSDP2
from ngd_dist.engines.unsupported import check_owners
from ngd_dist.errors import ConfigError

__all__ = ["ENGINES", "Engine", "Inner", "Piece", "all_at_rest", "class_of", "unwrap"]

ENGINES: list[Engine] = [DDP(), FSDP2(), DeepSpeed()]


def unwrap(model: nn.Module) -> tuple[Engine, nn.Module]:
    """Returns the engine that drives the model, and the model inside all wrappers, torch.compile's among them.

    Raises: ConfigError for nn.DataParallel, for two engines, and for an engine of which the model does not tell.
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
                engine, inner = candidate.bound(model), wrapped
        if not isinstance(inner, nn.Module):
            break
        model = inner
    for candidate in ENGINES:
        if candidate.drives(model):
            if engine.averages_gradients:
                raise ConfigError(f"one engine drives a model, got {engine.averager} around {candidate.averager}")
            engine = candidate.bound(model)
    check_owners(model, engine, ENGINES)
    return engine, model


def class_of(module: nn.Module) -> type[nn.Module]:
    """Returns the class that the module had before an engine gave it another."""
    given = (kind for engine in ENGINES if (kind := engine.class_of(module)) is not None)
    return next(given, type(module))


@contextmanager
def all_at_rest() -> Iterator[None]:
    """Keeps every engine from counting an evaluation of the loss as an iteration of training."""
    with ExitStack() as stack:
        for engine in ENGINES:
            stack.enter_context(engine.at_rest())
        yield

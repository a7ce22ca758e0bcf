"""Approximations of a layer's Fisher block. Start at `base.Preconditioner`.

A new method is one file, and a config class that names it (docs/extending.md). Two kinds of layer have the
same block under any method: normalisation has `UnitWise`, and one-hot inputs (embeddings) have K-FAC with a diagonal A.
"""

from collections.abc import Callable
from importlib import import_module

from ngd_dist.config import KFAC, NGDConfig, PreconditionerConfig
from ngd_dist.errors import ConfigError
from ngd_dist.factors.cost import LayerShape
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.preconditioners.unit_wise import UnitWise

__all__ = ["Cache", "Preconditioner", "Refreshed", "check_rows", "preconditioner_for"]


def preconditioner_for(shape: LayerShape, config: NGDConfig) -> Preconditioner:
    """Returns the method for one layer: the configured one, unless the layer's Fisher block needs another.

    Raises: ConfigError, if the configured method can't be imported or is no `Preconditioner`.
    """
    if shape.fisher == "unit_wise":
        return UnitWise(shape)
    chosen = config.preconditioner
    if shape.has_one_hot_inputs and not chosen.takes_one_hot_inputs:
        chosen = KFAC()
    method: Preconditioner = _method_of(chosen)(shape, chosen, config.max_dense)
    return method


def check_rows(config: NGDConfig, replicates: int) -> None:
    """Returns if the method can share a step among all ranks' micro-batches, `replicates` in all.

    Raises: ConfigError.
    """
    if refusal := config.preconditioner.refuses_batches(replicates):
        raise ConfigError(refusal)


def _method_of(choice: PreconditionerConfig) -> Callable[[LayerShape, PreconditionerConfig, int], Preconditioner]:
    """Returns the class that the choice names."""
    module, _, name = choice.method.partition(":")
    try:
        method = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"preconditioner {choice.kind} names {choice.method}, which can't be imported: {error}; "
            f"method of {type(choice).__name__} must be package.module:Class"
        ) from error
    if not (isinstance(method, type) and issubclass(method, Preconditioner)):
        raise ConfigError(
            f"preconditioner {choice.kind} names {choice.method}, which must be a subclass of "
            f"ngd_dist.preconditioners.Preconditioner, got {method!r}"
        )
    return method

"""Builds the transform of a job, which changes the model before an engine and the optimizer get it."""

from torch import nn

from ngd_dist.errors import ConfigError
from ngd_dist.transforms import Transform, transform_of
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import JobSpec

__all__ = ["build_transform"]


def build_transform(model: nn.Module, spec: JobSpec) -> Transform | None:
    """Returns the transform, which has changed the model; None if the spec has none. Raises: SpecError."""
    if spec.transform is None:
        return None
    try:
        return transform_of(model, spec.transform)
    except ConfigError as error:
        raise SpecError(f"transform {spec.transform.kind} doesn't fit the model: {error}") from error

"""The approximation of a layer's Fisher block: a file for each method of this package. Start at `base`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator

from ngd_dist.config.methods.base import DEFAULT_THRESHOLD, PRECONDITIONERS, PreconditionerConfig, Sharing, is_ours
from ngd_dist.config.methods.ekfac import EKFAC
from ngd_dist.config.methods.eva import Eva
from ngd_dist.config.methods.kfac import KFAC
from ngd_dist.config.methods.lngd import LNGD
from ngd_dist.config.methods.seng import SENG
from ngd_dist.config.methods.singd import SINGD
from ngd_dist.config.methods.tkfac import TKFAC

__all__ = [
    "DEFAULT_THRESHOLD",
    "EKFAC",
    "KFAC",
    "LNGD",
    "PRECONDITIONERS",
    "SENG",
    "SINGD",
    "TKFAC",
    "Eva",
    "PreconditionerChoice",
    "PreconditionerConfig",
    "Sharing",
]


def _or_registered(given: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Returns an instance of any method's class as it is, and the class of another package for its kind."""
    if isinstance(given, PreconditionerConfig):
        return given
    kind = given.get("kind") if isinstance(given, Mapping) else None
    choice = PRECONDITIONERS.get(kind) if isinstance(kind, str) else None
    if choice is None or is_ours(choice):
        return validate(given)
    return choice.model_validate(given)


if TYPE_CHECKING:
    PreconditionerChoice = PreconditionerConfig
else:
    # Its JSON schema is that of the methods of this package: the ones that a job may name.
    PreconditionerChoice = Annotated[
        KFAC | EKFAC | LNGD | TKFAC | SENG | Eva | SINGD,
        Field(discriminator="kind"),
        WrapValidator(_or_registered),
        SerializeAsAny(),
    ]

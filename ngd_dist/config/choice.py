"""The bases of all settings: `Settings`, and `Choice` for a setting that several classes can fill."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from ngd_dist.config.ngd import NGDConfig

__all__ = ["Choice", "Settings"]


class Settings(BaseModel):
    """Base of every configuration class: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(Settings):
    """One of the classes that can fill a field of `NGDConfig`; `kind` tells them apart."""

    kind: str

    # Whether `NGD.step` must be able to evaluate the loss again.
    needs_objective: ClassVar[bool] = False

    def refuses(self, config: "NGDConfig") -> str | None:
        """Returns the contradiction between this choice and another setting of `config`, with the way out, or None.

        `NGDConfig` calls it on each of its choices; the text becomes a ValidationError. If a choice would ignore a
        setting, that setting contradicts it.
        """
        return None

"""Types of settings that several parts have: folders, files and addresses."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

__all__ = ["Address", "OptionalPath", "Origin", "SomePath", "WithoutPassword"]


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"the path {path} names a user whose home is not known; give the whole path") from error


def _no_credentials(url: object, info: ValidationInfo) -> object:
    if isinstance(url, str) and "@" in url:
        raise ValueError(
            f"{info.field_name} (NGD_{str(info.field_name).upper()}) must hold no user and password, for logs show "
            "it; leave out what is before the '@' and the '@'"
        )
    return url


SomePath = Annotated[Path, AfterValidator(_absolute)]
# An empty variable counts as none, and not as the working directory.
OptionalPath = Annotated[SomePath | None, BeforeValidator(lambda path: path or None)]
WithoutPassword = Annotated[str, BeforeValidator(_no_credentials)]
Origin = Annotated[str, Field(pattern=r"^(https?://[^/\s]+)?$"), BeforeValidator(_no_credentials)]
Address = Annotated[str, Field(pattern=r"^(https?://[^\s]+)?$"), BeforeValidator(_no_credentials)]

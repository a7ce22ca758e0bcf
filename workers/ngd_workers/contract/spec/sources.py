"""The data that a job may train on."""

from typing import Annotated, Literal

from pydantic import Field

from ngd_workers.contract.spec.base import Function, Options, SpecModel

__all__ = ["IDX", "DataChoice", "Digits", "UserData"]


class Digits(SpecModel):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8, 10 classes; they ship with the package."""

    kind: Literal["digits"] = "digits"
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share of the images held out for the test; seed 0 draws the split."
    )


class IDX(SpecModel):
    """Images and labels in the four IDX files of MNIST and its relatives (Fashion-MNIST), plain or gzipped."""

    kind: Literal["idx"] = "idx"
    directory: str = Field(
        description="Folder with the four files; a relative path starts at NGD_DATA_DIR or --data-dir."
    )
    mean: float = Field(default=0.0, description="Number subtracted from the pixels, which are in [0, 1].")
    std: float = Field(default=1.0, gt=0, description="Divisor of the pixels, after the mean is subtracted.")


class UserData(SpecModel):
    """The user's own `package.module:function`; it returns a `ngd_workers.data.Dataset`, or (train, test)."""

    kind: Literal["function"] = "function"
    function: Function
    options: Options = Field(default={})


DataChoice = Annotated[Digits | IDX | UserData, Field(discriminator="kind")]

"""The data that a job may train on."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ngd_workers.contract.spec.base import Function, Options, SpecModel
from ngd_workers.contract.spec.images import ImageSettings, OnBadSample

__all__ = ["IDX", "DataChoice", "Digits", "ImageFolder", "ShardCache", "UserData", "WebDataset"]


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


class ImageFolder(SpecModel):
    """Image files in a folder for each part and, in it, for each class: `train/<class>/<image>`."""

    kind: Literal["image_folder"] = "image_folder"
    directory: str = Field(
        min_length=1,
        description="Folder with the two parts; a relative path starts at NGD_DATA_DIR or --data-dir.",
    )
    train: str = Field(default="train", min_length=1, description="Folder of the training images, in the directory.")
    test: str = Field(default="val", min_length=1, description="Folder of the test images, in the directory.")
    images: ImageSettings = ImageSettings()
    on_bad_sample: OnBadSample = "raise"


class ShardCache(SpecModel):
    """Where shards from afar are kept on a disk of the worker's machine; all its workers share it."""

    directory: str = Field(min_length=1, description="Folder on a local disk; an absolute path.")
    bytes: int = Field(ge=1, le=2**63 - 1, description="Most that its shards may take together; the oldest go first.")

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        if not self.directory.startswith("/"):
            raise ValueError(f"cache.directory must be an absolute path, got {self.directory!r}")
        return self


class WebDataset(SpecModel):
    """Images in tar shards with an index for each part, as `ngd data pack` makes them; on a disk or far away."""

    kind: Literal["webdataset"] = "webdataset"
    directory: str = Field(
        min_length=1,
        description="Folder with the two parts, or its URL: http(s)://, s3:// or another that fsspec opens; a "
        "relative path starts at NGD_DATA_DIR or --data-dir.",
    )
    train: str = Field(default="train", min_length=1, description="Folder of the training shards, in the directory.")
    test: str = Field(default="val", min_length=1, description="Folder of the test shards, in the directory.")
    images: ImageSettings = ImageSettings()
    lanes: int | None = Field(
        default=None,
        ge=1,
        le=2**20,
        description="Streams of shards that a global batch is taken from; a rank reads global_size / workers of "
        "them. It divides batch.global_size. None: one per shard, or the next fewer that divide it.",
    )
    window: int = Field(default=4, ge=1, le=2**20, description="Shards of a lane in which samples are shuffled.")
    cache: ShardCache | None = Field(
        default=None, description="Keeps whole shards from afar on disk; None: each sample is read by its own request."
    )
    storage_options: Options = Field(
        default={},
        description="Keyword arguments of fsspec's file system for the URL, such as anon or endpoint_url. No keys: the "
        "spec is stored. S3's come from the workers' environment.",
    )
    on_bad_sample: OnBadSample = "raise"

    @model_validator(mode="after")
    def _cache_is_used(self) -> Self:
        if "://" not in self.directory and (self.cache or self.storage_options):
            given = "cache" if self.cache else "storage_options"
            raise ValueError(f"{given} is for a directory with a URL, got {self.directory!r}; leave {given} out")
        return self


class UserData(SpecModel):
    """The user's own `package.module:function`; it returns a `ngd_workers.data.Dataset`, or (train, test)."""

    kind: Literal["function"] = "function"
    function: Function
    options: Options = Field(default={})


DataChoice = Annotated[
    Digits
    | IDX
    | ImageFolder
    | WebDataset
    # one choice a line
    | UserData,
    Field(discriminator="kind"),
]

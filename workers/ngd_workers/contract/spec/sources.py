"""The data that a job may train on."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ngd_workers.contract.spec.base import Function, Options, SpecModel, list_to_tuple
from ngd_workers.contract.spec.images import ImageSettings, OnBadSample
from ngd_workers.contract.spec.texts import TextPairs, Tokens

__all__ = [
    "IDX",
    "DataChoice",
    "Digits",
    "HuggingFace",
    "ImageFolder",
    "JpegNpz",
    "Parquet",
    "ShardCache",
    "Table",
    "UserData",
    "WebDataset",
]


_tuple: Any = BeforeValidator(lambda given: (given,) if isinstance(given, str) else list_to_tuple(given))
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _tuple]  # of columns, files or folders


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


class JpegNpz(SpecModel):
    """JPEG files with a common header in one .npz file: arrays header, body, offsets and labels.

    Image i is header + body[offsets[i]:offsets[i + 1]], and labels[i] its class.
    """

    kind: Literal["jpeg_npz"] = "jpeg_npz"
    file: str = Field(min_length=1, description="The file; a relative path starts at NGD_DATA_DIR or --data-dir.")
    train_samples: int = Field(ge=1, description="The first so many images are for training, the others for test.")
    images: ImageSettings = ImageSettings()
    on_bad_sample: OnBadSample = "raise"


class Table(SpecModel):
    """The columns of a table that hold a sample: an image or numbers, and its class or the numbers to predict."""

    image: str | None = Field(default=None, description="Column with an image file's bytes; give this or features.")
    features: Names = Field(default=(), description="Columns of numbers, or of lists of equally many numbers.")
    label: str | None = Field(default=None, description="Column with the class, a whole number; give this or target.")
    target: Names = Field(default=(), description="Columns with the numbers to predict; not for images.")
    classes: int | None = Field(
        default=None, ge=1, description="Number of classes; None: the largest label for training, plus one."
    )
    images: ImageSettings | None = Field(default=None, description="For an image column; None: the defaults.")
    on_bad_sample: OnBadSample = "raise"

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.image is None) != bool(self.features):
            raise ValueError(
                f"give exactly one of image and features, got image={self.image} and features={list(self.features)}"
            )
        if (self.label is None) != bool(self.target):
            raise ValueError(
                f"give exactly one of label and target, got label={self.label} and target={list(self.target)}"
            )
        if self.image is not None and self.target:
            raise ValueError(f"an image takes a label, got target={list(self.target)}; for other data take function")
        if self.images is not None and self.image is None:
            raise ValueError("images is for an image column, and image is not given; leave images out")
        if self.classes is not None and self.label is None:
            raise ValueError(f"classes is for a label column, got {self.classes} without label; leave classes out")
        return self


class Parquet(Table):
    """Rows of Parquet files. Their row groups are read whole, a few at a time."""

    kind: Literal["parquet"] = "parquet"
    train: Names = Field(
        min_length=1,
        description="Files of the training part, or folders whose *.parquet files are taken by name; relative paths "
        "start at NGD_DATA_DIR or --data-dir.",
    )
    test: Names = Field(min_length=1, description="Files or folders of the test part.")
    window: int = Field(
        default=4,
        ge=1,
        le=2**20,
        description="Row groups in which training rows are shuffled. Each worker, or each of its loading processes, "
        "keeps so many and one more in memory.",
    )


class HuggingFace(Table):
    """A DatasetDict that Hugging Face's `datasets` has saved by save_to_disk. Needs ngd-workers[datasets]."""

    kind: Literal["huggingface"] = "huggingface"
    directory: str = Field(
        min_length=1, description="The saved folder; a relative path starts at NGD_DATA_DIR or --data-dir."
    )
    train: str = Field(default="train", min_length=1, description="Name of the training part.")
    test: str = Field(default="test", min_length=1, description="Name of the test part.")


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
    | JpegNpz
    | Parquet
    | HuggingFace
    | Tokens
    | TextPairs
    # one choice a line
    | UserData,
    Field(discriminator="kind"),
]

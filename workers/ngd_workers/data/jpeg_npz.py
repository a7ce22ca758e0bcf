"""JPEG files that share a header, in one .npz file: small images of one size, such as CIFAR-10's.

Image i is `header + body[offsets[i]:offsets[i + 1]]`, and its class labels[i]. They stay compressed in memory.
"""

import zipfile
from pathlib import Path

import numpy as np

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import JpegNpz
from ngd_workers.data.base import Dataset
from ngd_workers.data.images import image_dataset

__all__ = ["load"]


class Slices:
    """The images from number `first` on: bytes and class."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray], first: int, last: int) -> None:
        self._path, self._first = path, first
        self._header = arrays["header"].tobytes()
        self._offsets = arrays["offsets"][first : last + 1].astype(np.int64)
        self._labels = arrays["labels"][first:last]
        self._body = arrays["body"][self._offsets[0] : self._offsets[-1]]
        self._offsets = self._offsets - self._offsets[0]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        begin, end = self._offsets[index : index + 2]
        return self._header + self._body[begin:end].tobytes(), int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._path}, image {self._first + index}"


def load(choice: JpegNpz, data_dir: Path | None) -> Dataset:
    """Returns the first `train_samples` images, and the others.

    Raises: DataNotFoundError, InvalidDataError, SpecError.
    """
    path = Path(choice.file) if Path(choice.file).is_absolute() else (data_dir or Path()) / choice.file
    if not path.is_file():
        raise DataNotFoundError(
            f"no data file {path} (data.file is {choice.file!r}); set NGD_DATA_DIR or --data-dir to the folder that "
            "holds it, or give an absolute path"
        )
    arrays = _arrays(path)
    samples = len(arrays["labels"])
    if choice.train_samples >= samples:
        raise SpecError(
            f"data.train_samples must be below the number of images, {samples}, got {choice.train_samples}; the others "
            "are the test part"
        )
    return image_dataset(
        Slices(path, arrays, 0, choice.train_samples),
        Slices(path, arrays, choice.train_samples, samples),
        int(arrays["labels"].max()) + 1,
        choice.images,
        skips_bad_samples=choice.on_bad_sample == "skip",
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    names = ("header", "body", "offsets", "labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise InvalidDataError(f"{path} must hold the arrays {', '.join(names)}; it lacks {', '.join(missing)}")
            arrays = {name: file[name] for name in names}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, InvalidDataError):
            raise
        raise InvalidDataError(f"{path} is not a whole .npz file: {error}; get it again") from error
    offsets, labels = arrays["offsets"], arrays["labels"]
    if len(offsets) != len(labels) + 1 or not len(labels) or offsets[-1] != len(arrays["body"]):
        raise InvalidDataError(
            f"{path} must have one offset more than labels, the last one the length of body "
            f"({len(arrays['body'])}), got {len(offsets)} offsets for {len(labels)} labels; get it again"
        )
    if labels.min() < 0 or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise InvalidDataError(f"{path} must have labels from 0 and offsets that rise; get it again")
    return arrays

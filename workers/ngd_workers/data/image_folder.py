"""Image files in a folder for each part and, in it, for each class."""

from pathlib import Path

import numpy as np

from ngd_workers.contract.errors import InvalidDataError, StorageError
from ngd_workers.contract.spec import ImageFolder
from ngd_workers.data.base import Dataset
from ngd_workers.data.folder import find_folder
from ngd_workers.data.images import image_dataset
from ngd_workers.data.names import Names
from ngd_workers.shards.folder import files_below, same_classes, sorted_into_classes

__all__ = ["load"]


class FolderImages:
    """The image files of one part, class after class. classes: the names of their folders, in order."""

    def __init__(self, root: Path) -> None:
        self.classes, images = sorted_into_classes(files_below(root), str(root))
        self._root = root
        self._names = Names(name for name, _ in images)
        self._labels = np.array([label for _, label in images], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            return (self._root / self._names[index]).read_bytes(), int(self._labels[index])
        except (FileNotFoundError, PermissionError) as error:
            raise InvalidDataError(f"the file can't be read: {error.strerror}") from error
        except OSError as error:
            raise StorageError(f"can't read {self.name(index)}: {error}; check the volume") from error

    def name(self, index: int) -> str:
        return str(self._root / self._names[index])


def load(choice: ImageFolder, data_dir: Path | None) -> Dataset:
    """Returns the two parts of the folder. Raises: DataNotFoundError, InvalidDataError."""
    folder = find_folder(choice.directory, data_dir)
    train, test = FolderImages(folder / choice.train), FolderImages(folder / choice.test)
    same_classes(train.classes, test.classes, str(folder / choice.train), str(folder / choice.test))
    skips = choice.on_bad_sample == "skip"
    return image_dataset(train, test, len(train.classes), choice.images, skips_bad_samples=skips)

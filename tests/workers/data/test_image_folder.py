"""A folder of images by class."""

from pathlib import Path

import numpy as np
import pytest

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError
from ngd_workers.contract.spec import ImageFolder
from ngd_workers.data import Dataset, Images, load_dataset
from ngd_workers.data.names import Names
from tests.support.picture_files import picture, picture_folder


def load(root: Path, **options: object) -> Dataset:
    content = {"directory": root.name, "images": {"size": 8}} | options
    return load_dataset(ImageFolder.model_validate(content), root.parent)


def labels(part: object) -> list[int]:
    return [part[index][1] for index in range(len(part))]  # type: ignore[index,arg-type]


def test_classes_are_the_sorted_folders(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 7, "val": 4})

    dataset = load(root)

    assert dataset.shape == Images(3, 8, 8, classes=3)
    assert labels(dataset.train) == [0, 0, 0, 1, 1, 2, 2]
    assert labels(dataset.test) == [0, 0, 1, 2]


def test_parts_may_have_other_names_and_images_lie_deeper(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"a": 3, "b": 3})
    deeper = root / "a" / "class1" / "more" / "deeper"
    deeper.mkdir(parents=True)
    (deeper / "x.JPEG").write_bytes(picture(1))
    (root / "a" / "class1" / "notes.txt").write_text("not an image")
    (root / "a" / "class1" / ".hidden.jpg").write_bytes(b"")
    (root / "a" / ".git" / "class9").mkdir(parents=True)

    dataset = load(root, train="a", test="b")

    assert labels(dataset.train) == [0, 1, 1, 2]


def test_missing_part_names_its_folder(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 3})

    with pytest.raises(DataNotFoundError, match=r"no folder .*pictures/val; it should hold a folder .* for each class"):
        load(root)
    with pytest.raises(DataNotFoundError, match="set NGD_DATA_DIR"):
        load(tmp_path / "elsewhere")


def test_parts_with_different_classes_are_refused(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 3, "val": 2})

    with pytest.raises(InvalidDataError, match=r"train has 3 classes and .*val has 2: 'class2' is in the first alone"):
        load(root)


def test_folder_without_images_and_image_without_class_are_refused(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 3, "val": 3})
    (root / "train" / "empty").mkdir()
    with pytest.raises(InvalidDataError, match=r"train/empty holds no image"):
        load(root)
    (root / "train" / "empty").rmdir()

    (root / "val" / "stray.png").write_bytes(picture(1, kind="png"))
    with pytest.raises(InvalidDataError, match=r"val/stray\.png lies in no class"):
        load(root)

    (tmp_path / "nothing" / "train").mkdir(parents=True)
    with pytest.raises(InvalidDataError, match="holds no class"):
        load(tmp_path / "nothing")


def test_bad_image_is_named_and_may_be_skipped(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "pictures", {"train": 6, "val": 3})
    (root / "train" / "class1" / "0001.jpg").write_bytes(b"no image")

    dataset = load(root)

    with pytest.raises(InvalidDataError, match=r"sample 2, .*/train/class1/0001\.jpg: .* no image format"):
        dataset.train[2]  # type: ignore[index]
    assert not dataset.skips_bad_samples
    assert load(root, on_bad_sample="skip").skips_bad_samples
    (root / "train" / "class1" / "0001.jpg").unlink()
    with pytest.raises(InvalidDataError, match=r"sample 2, .*0001\.jpg: the file can't be read: No such file"):
        dataset.train[2]  # type: ignore[index]


def test_names_come_back_as_they_went_in_and_take_their_letters_alone() -> None:
    texts = ["a.jpg", "", "bücher/ä.png", "bad-\udcff.jpg"]

    names = Names(texts)

    assert [names[np.int64(index)] for index in range(len(names))] == texts
    assert len(names._blob) == sum(len(text.encode("utf-8", "surrogateescape")) for text in texts)

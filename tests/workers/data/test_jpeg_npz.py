import os
from pathlib import Path

import numpy as np
import pytest

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import ImageSettings, JpegNpz, NoAugment
from ngd_workers.data import Images, load_dataset
from tests.support.small_images import write_jpeg_npz

PLAIN = ImageSettings(size=32, augment=NoAugment())


def choice(train_samples=6, **changes):
    return JpegNpz(file="small.npz", train_samples=train_samples, images=PLAIN, **changes)


def test_images_and_classes_are_those_of_the_file(tmp_path):
    values = write_jpeg_npz(tmp_path / "small.npz", samples=10, classes=3)

    dataset = load_dataset(choice(), tmp_path)

    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    assert dataset.shape == Images(3, 32, 32, classes=3)
    for part, first in ((dataset.train, 0), (dataset.test, 6)):
        for number in range(len(part)):
            image, label = part[number]
            assert label == (first + number) % 3
            assert abs(float(image.float().mean()) - values[first + number]) < 3  # JPEG rounds


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda arrays: arrays.pop("labels"), "lacks labels"),
        (lambda arrays: arrays.update(offsets=arrays["offsets"][:-1]), "10 offsets for 10 labels"),
        (lambda arrays: arrays.update(body=arrays["body"][:-5]), "the last one the length of body"),
        (lambda arrays: arrays["offsets"].__setitem__(3, 0), "offsets that rise"),
        (lambda arrays: arrays.update(labels=arrays["labels"] - 1), "labels from 0"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(tmp_path, spoil, message):
    write_jpeg_npz(tmp_path / "small.npz", samples=10, classes=3)
    arrays = dict(np.load(tmp_path / "small.npz"))
    spoil(arrays)
    np.savez(tmp_path / "small.npz", **arrays)

    with pytest.raises(InvalidDataError, match=message):
        load_dataset(choice(), tmp_path)


def test_damaged_image_is_named_by_its_number_in_the_file(tmp_path):
    write_jpeg_npz(tmp_path / "small.npz", samples=10, classes=3)
    arrays = dict(np.load(tmp_path / "small.npz"))
    arrays["header"] = arrays["header"][2:]
    np.savez(tmp_path / "small.npz", **arrays)

    with pytest.raises(InvalidDataError, match=r"sample 1, .*small\.npz, image 7: the image can't be decoded"):
        load_dataset(choice(), tmp_path).test[1]


def test_file_that_is_absent_or_no_archive_is_named(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"no data file .*small\.npz \(data\.file"):
        load_dataset(choice(), tmp_path)
    (tmp_path / "small.npz").write_bytes(b"nonsense")
    with pytest.raises(InvalidDataError, match=r"is not a whole \.npz file"):
        load_dataset(choice(), tmp_path)


def test_a_test_part_must_be_left(tmp_path):
    write_jpeg_npz(tmp_path / "small.npz", samples=10, classes=3)

    with pytest.raises(SpecError, match="train_samples must be below the number of images, 10, got 10"):
        load_dataset(choice(train_samples=10), tmp_path)


@pytest.mark.skipif("NGD_DATA_DIR" not in os.environ, reason="set NGD_DATA_DIR to the folder with cifar10/")
def test_the_copy_of_cifar10_has_its_parts_and_classes():
    file = JpegNpz(file="cifar10/cifar10_jpeg75.npz", train_samples=50_000, images=PLAIN)

    dataset = load_dataset(file, Path(os.environ["NGD_DATA_DIR"]))

    assert (len(dataset.train), len(dataset.test), dataset.shape.classes) == (50_000, 10_000, 10)
    labels = [dataset.test[number][1] for number in range(0, 10_000, 500)]
    assert np.bincount(labels).tolist() == [2] * 10  # grouped by class

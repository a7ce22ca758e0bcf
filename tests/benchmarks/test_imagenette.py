"""The seconds to a target on Imagenette: the archive is read, and both optimizers learn."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import imagenette
from benchmarks.imagenette import Images, batches, load, table, train
from tests.support.data_sets import picture


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / imagenette.ARCHIVE, "w") as file:
        for part, count in (("train", 8), ("val", 4)):
            for number in range(count):
                buffer = io.BytesIO()
                picture(number, 112).save(buffer, "JPEG")
                file.writestr(f"imagenette112/{part}/{'nb' if number % 2 else 'na'}/{number}.JPEG", buffer.getvalue())
    return tmp_path


def test_archive_is_read_by_part_and_class(archive: Path) -> None:
    training, test = load(archive, "train", "cpu"), load(archive, "val", "cpu")

    assert (training.x.shape, training.x.dtype) == ((8, 3, 112, 112), torch.uint8)
    assert (training.y.tolist(), len(test.y)) == ([0] * 4 + [1] * 4, 4)
    assert training.x[training.y == 1].float().mean() > training.x[training.y == 0].float().mean() + 50


@pytest.mark.parametrize("name", list(imagenette.OPTIMIZERS))
def test_both_optimizers_learn_and_say_when(name: str, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenette, "BATCH", 4)
    training = load(archive, "train", "cpu")
    many = Images(training.x.repeat(8, 1, 1, 1), training.y.repeat(8))
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(24), nn.Flatten(), nn.Linear(48, 2))
    monkeypatch.setattr("benchmarks.imagenette.batches", lambda images, seed: batches(images, seed, size=16))

    row = train(name, model, many, load(archive, "val", "cpu"), steps=30, every=10, most_s=60)

    assert row["reached"]["accuracy"] >= imagenette.TARGET
    assert [point["step"] for point in row["curve"]] == [10, 20, 30]
    assert f"| {name} | {row['reached']['seconds']:.1f} | {row['reached']['step']} |" in table([row])


def test_a_run_ends_with_its_time(archive: Path) -> None:
    images = load(archive, "val", "cpu")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 2))
    many = Images(images.x.repeat(64, 1, 1, 1), images.y.repeat(64))

    row = train("sgd", model, many, images, steps=30, every=1, most_s=0.0)

    assert row["steps"] == 1

import io
import pickle
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import HuggingFace, ImageSettings, Loading, NoAugment, Parquet
from ngd_workers.data import Images, Vectors, load_dataset
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.batches import Batches
from ngd_workers.train.loading import Samples, read_ahead, requests_to_train
from tests.support.attempts import make_attempt, small_spec

PLAIN = ImageSettings(size=8, augment=NoAugment())


def png(value):
    stored = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(stored, "png")
    return stored.getvalue()


def rows(first, last):
    """Returns rows whose number is in each column."""
    numbers = list(range(first, last))
    return pa.table(
        {
            "a": [float(n) for n in numbers],
            "b": [[n + 0.5, n + 0.25] for n in numbers],
            "label": [n % 3 for n in numbers],
            "goal": [2.0 * n for n in numbers],
            "image": [png(n) for n in numbers],
            "other": ["not read"] * len(numbers),
        }
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    pq.write_table(rows(0, 25), tmp_path / "train" / "b.parquet", row_group_size=10)
    pq.write_table(rows(25, 31), tmp_path / "train" / "c.parquet", row_group_size=10)
    pq.write_table(rows(31, 40), tmp_path / "test.parquet")
    return tmp_path


@pytest.fixture
def saved(tmp_path):
    parts = {"train": rows(0, 31), "test": rows(31, 40)}
    features = datasets.Features(
        {
            "a": datasets.Value("float64"),
            "b": datasets.List(datasets.Value("float32")),
            "label": datasets.ClassLabel(num_classes=5),
            "goal": datasets.Value("float64"),
            "image": datasets.Image(),
            "other": datasets.Value("string"),
        }
    )
    whole = {
        name: datasets.Dataset.from_dict(
            {**table.to_pydict(), "image": [{"bytes": each, "path": None} for each in table["image"].to_pylist()]},
            features=features,
        )
        for name, table in parts.items()
    }
    datasets.DatasetDict(whole).save_to_disk(str(tmp_path / "saved"))
    return tmp_path


def parquet(**columns):
    return Parquet(train=("train",), test=("test.parquet",), **columns)


def huggingface(**columns):
    return HuggingFace(directory="saved", **columns)


@pytest.fixture(params=[parquet, huggingface], ids=["parquet", "huggingface"])
def choose(request, tmp_path):
    request.getfixturevalue("folder" if request.param is parquet else "saved")
    return request.param


def test_numbers_and_classes_are_those_of_the_row(choose, tmp_path):
    dataset = load_dataset(choose(features=("a", "b"), label="label", classes=4), tmp_path)

    assert (len(dataset.train), len(dataset.test)) == (31, 9)
    assert dataset.shape == Vectors(width=3, outputs=4)
    for n in (0, 9, 10, 24, 25, 30, 3):
        x, y = dataset.train[n]
        assert (x.tolist(), y) == ([n, n + 0.5, n + 0.25], n % 3)
    assert dataset.test[0][0].tolist()[0] == 31


def test_targets_are_numbers(choose, tmp_path):
    dataset = load_dataset(choose(features="a", target=("goal", "a")), tmp_path)

    assert dataset.shape == Vectors(width=1, outputs=2)
    assert dataset.train[7][1].tolist() == [14, 7]


def test_images_are_decoded(choose, tmp_path):
    dataset = load_dataset(choose(image="image", label="label", images=PLAIN), tmp_path)

    image, label = dataset.train[26]

    assert image.shape == (3, 8, 8)
    assert image.unique().tolist() == [26]
    assert label == 26 % 3
    assert dataset.shape == Images(3, 8, 8, classes=3 if choose is parquet else 5)  # a ClassLabel tells its number


def test_parts_survive_another_process(choose, tmp_path):
    dataset = load_dataset(choose(features="a", target="goal"), tmp_path)
    dataset.train[0]

    assert pickle.loads(pickle.dumps(dataset.train))[30][0].tolist() == [30]


@pytest.mark.parametrize("processes", [0, 2])
def test_every_row_comes_once_an_epoch_in_windows_of_row_groups(folder, processes):
    dataset = load_dataset(parquet(features="a", label="label"), folder)
    batches = Batches(31, 1, 0, dataset.shards)
    requests = requests_to_train(batches, first_step=1, last_step=31, micro_size=1, rank=0, world_size=1)

    loading = Loading(processes=processes)
    read = list(read_ahead(Samples(dataset.train, dataset, 0), requests, loading, pins=False))

    assert sorted(int(batch.content[0]) for batch in read) == list(range(31))


def test_memory_holds_a_few_row_groups_of_a_large_file(tmp_path):
    groups, size = 40, 250_000  # bytes of a row group
    with pq.ParquetWriter(tmp_path / "large.parquet", pa.schema({"x": pa.binary(), "y": pa.int64()})) as writer:
        for number in range(groups):
            content = np.random.default_rng(number).bytes(size // 10)
            writer.write_table(pa.table({"x": [content] * 10, "y": [number] * 10}))
    choice = Parquet(train="large.parquet", test="large.parquet", image="x", label="y", window=2)
    part = load_dataset(choice, tmp_path).train
    used = []

    tracemalloc.start()
    for number in range(0, len(part), 5):
        part._files[number]
        used.append(pa.total_allocated_bytes())
    tracemalloc.stop()

    assert max(used) < 6 * size  # the window and one more, and the one that is being read


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"features": "aa", "label": "label"}, SpecError, r"data.train has no column 'aa' \(did you mean|its columns"),
        ({"features": "a", "label": "lable"}, SpecError, r"no column 'lable' \(did you mean 'label'"),
        ({"features": "other", "target": "a"}, InvalidDataError, r"sample 0, .*'other' must hold numbers.*'not read'"),
        (
            {"features": "a", "label": "goal"},
            InvalidDataError,
            "'goal' must hold classes, .*from 0, got double",
        ),
    ],
)
def test_column_that_cannot_be_used_is_named(choose, tmp_path, columns, error, message):
    with pytest.raises(error, match=message):
        load_dataset(choose(**columns), tmp_path)


def test_label_out_of_range_is_named_with_its_row(folder):
    dataset = load_dataset(parquet(features="a", label="label", classes=2), folder)

    with pytest.raises(InvalidDataError, match=r"sample 14, .*b\.parquet, row 4 of row group 1: .* got 2; check"):
        dataset.train[14]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "label"}, r"exactly one of image and features, got image=None and features=\[\]"),
        ({"image": "image", "features": "a", "label": "label"}, "exactly one of image and features"),
        ({"features": "a"}, "exactly one of label and target"),
        ({"image": "image", "target": "goal"}, "an image takes a label"),
        ({"features": "a", "label": "label", "images": {}}, "images is for an image column"),
        ({"features": "a", "target": "goal", "classes": 3}, "classes is for a label column, got 3"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        parquet(**columns)


def test_missing_and_damaged_files_are_named(folder):
    columns = {"features": ("a",), "label": "label"}
    (folder / "empty").mkdir()
    (folder / "cut.parquet").write_bytes((folder / "test.parquet").read_bytes()[:-100])

    for path, error, message in (
        ("absent", DataNotFoundError, r"no file or folder .*absent \(data.test"),
        ("empty", DataNotFoundError, r"data.test has no \*.parquet file in empty"),
        ("cut.parquet", InvalidDataError, "cut.parquet is not a whole Parquet file"),
    ):
        with pytest.raises(error, match=message):
            load_dataset(Parquet(train="train", test=path, **columns), folder)


def test_saved_data_without_the_parts_are_refused(saved):
    columns = {"features": ("a",), "label": "label"}
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(saved / "one"))
    (saved / "none").mkdir()

    for settings, error, message in (
        (
            {"directory": "saved", "test": "validation"},
            SpecError,
            "data.test must be one of .*, got 'validation'",
        ),
        ({"directory": "one"}, SpecError, "holds one part; save a DatasetDict with the parts train and test"),
        ({"directory": "none"}, InvalidDataError, "is not what datasets' save_to_disk writes"),
        ({"directory": "absent"}, DataNotFoundError, "no data directory"),
    ):
        with pytest.raises(error, match=message):
            load_dataset(HuggingFace(**settings, **columns), saved)


def test_missing_library_is_named_with_its_extra(saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)

    with pytest.raises(SpecError, match=r"install ngd-workers\[datasets\]"):
        load_dataset(huggingface(features="a", label="label"), saved)


@pytest.mark.parametrize("task", ["image_classification", "regression"])
def test_a_job_trains_on_rows(folder, tmp_path, task):
    chosen = {"label": "label"} if task == "image_classification" else {"target": ["goal"]}
    spec = small_spec(
        data={"kind": "parquet", "train": ["train"], "test": "test.parquet", "features": ["b"], **chosen},
        task={"kind": task},
        optimizer={"kind": "ngd", "lr": 0.01, "damping": 1.0},
        batch={"global_size": 10},
    )

    outcome = run_rank(make_attempt(tmp_path / "run", spec, data_dir=folder))

    assert outcome.message is None
    assert outcome.step == 8


def test_dtype_of_a_batch_is_float32(choose, tmp_path):
    dataset = load_dataset(choose(features=("a", "b"), target="goal"), tmp_path)
    requests = requests_to_train(Batches(31, 4, 0), first_step=1, last_step=1, micro_size=4, rank=0, world_size=1)

    (batch,) = read_ahead(Samples(dataset.train, dataset, 0), requests, Loading(), pins=False)

    x, y = batch.content
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (4, 3), torch.float32, (4, 1))

"""Shards behind real HTTP servers and an S3 server: samples, and servers that fail."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moto.server import ThreadedMotoServer

from ngd_workers.contract.errors import SpecError, WorkerError
from ngd_workers.contract.spec import Loading, WebDataset
from ngd_workers.data import Dataset, load_dataset
from ngd_workers.data import storage as storage_module
from ngd_workers.shards.pack import pack
from ngd_workers.train.loading import Request, Samples, read_ahead
from tests.support.http_folder import http_folder
from tests.support.picture_files import picture_folder

IMAGES = {"size": 8, "augment": {"kind": "none"}}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    pictures = picture_folder(root / "pictures", {"train": 20, "val": 3})
    pack(pictures, root / "shards", ["train", "val"], lambda *_: None, samples_per_shard=6)
    return root / "shards"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_S", 2.0)


def load(directory: str, **options: object) -> Dataset:
    return load_dataset(WebDataset.model_validate({"directory": directory, "images": IMAGES} | options), None)


def pixels(dataset: Dataset, processes: int = 0) -> torch.Tensor:
    """Returns all training samples, read as the loop reads them."""
    requests = [Request(0, list(range(begin, begin + 5))) for begin in range(0, 20, 5)]
    batches = read_ahead(Samples(dataset.train, dataset, 0), requests, Loading(processes=processes), pins=False)
    return torch.cat([batch.content[0] for batch in batches])


def failure(dataset: Dataset, index: int = 0) -> str:
    with pytest.raises(WorkerError) as error:
        dataset.train[index]  # type: ignore[index]
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("is_cached", [False, True])
def test_http_gives_the_pixels_of_the_disk(packed: Path, tmp_path: Path, is_cached: bool, processes: int) -> None:
    cache = {"directory": str(tmp_path / "cache"), "bytes": 10**6} if is_cached else None
    with http_folder(packed) as server:
        dataset = load(server.url, cache=cache)

        assert torch.equal(pixels(dataset, processes), pixels(load(str(packed))))
        assert torch.equal(pixels(dataset, processes), pixels(load(str(packed))))

        gets = [server.gets(f"shard-{number:06d}.tar") for number in range(4)]
        assert gets == [1, 1, 1, 1] if is_cached else sum(gets) >= 40


def test_server_without_range_is_an_error_unless_shards_are_cached(packed: Path, tmp_path: Path) -> None:
    with http_folder(packed, knows_ranges=False) as server:
        message = failure(load(server.url))
        cached = load(server.url, cache={"directory": str(tmp_path), "bytes": 10**6})

        assert message.startswith("SpecError: ")
        assert "shard-000000.tar came with" in message
        assert "the server does not know Range requests; give data.cache" in message
        assert torch.equal(pixels(cached), pixels(load(str(packed))))


def test_cut_and_missing_shards_are_named(packed: Path, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    for file in packed.rglob("*.*"):
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / file.parent.name / file.name).write_bytes(file.read_bytes())
    os.truncate(root / "train" / "shard-000000.tar", 1000)
    (root / "train" / "shard-000001.tar").unlink()
    cache = {"directory": str(tmp_path / "cache"), "bytes": 10**6}
    with http_folder(root) as server:
        ranges, cached = load(server.url), load(server.url, cache=cache)

        assert "bytes came where" in failure(ranges, 0)  # it ends in this sample
        assert "sample 5, http://" in failure(ranges, 5)
        assert "ends before the range" in failure(ranges, 5)
        assert "the file has 1000 bytes and its index says" in failure(cached, 0)
        assert "it is cut" in failure(cached, 1)
        assert server.gets("shard-000000.tar") <= 8  # a shard that does not fit is not fetched for each sample
        for dataset in (ranges, cached):
            assert "DataNotFoundError: there is no http://" in failure(dataset, 6)
        with pytest.raises(WorkerError, match=r"there is no http.*/elsewhere/index\.json; check data\.directory"):
            load(server.url, train="elsewhere")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_server_that_fails_for_a_moment_is_asked_again(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http_folder(packed) as server:
        dataset = load(server.url)
        server.failures = 2
        assert dataset.train[0][1] in range(3)  # type: ignore[index]
        assert server.failures == 0

        server.failures = 1000
        monkeypatch.setattr(storage_module, "PATIENCE_S", 0.1)
        assert failure(dataset).startswith("StorageError: can't read http://")


@pytest.fixture
def s3(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="pictures")
    for file in packed.rglob("*.*"):
        client.upload_file(str(file), "pictures", f"packed/{file.relative_to(packed).as_posix()}")
    client.close()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.mark.parametrize("is_cached", [False, True])
def test_s3_gives_the_pixels_of_the_disk(packed: Path, tmp_path: Path, s3: str, is_cached: bool) -> None:
    cache = {"directory": str(tmp_path / "cache"), "bytes": 10**6} if is_cached else None

    dataset = load("s3://pictures/packed", storage_options={"endpoint_url": s3}, cache=cache)

    assert torch.equal(pixels(dataset, processes=2), pixels(load(str(packed))))
    assert torch.equal(pixels(dataset), pixels(load(str(packed))))
    with pytest.raises(WorkerError, match=r"there is no s3://pictures/elsewhere/train/index\.json"):
        load("s3://pictures/elsewhere", storage_options={"endpoint_url": s3})


def test_unknown_protocols_and_options_are_refused() -> None:
    with pytest.raises(SpecError, match=r"can't open nosuch://x/train with data.storage_options \[\]"):
        load("nosuch://x")

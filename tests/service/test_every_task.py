"""One job of each task and of each source of data, posted over HTTP and trained by the real driver."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ngd_workers.data import SOURCES, Dataset, Images
from ngd_workers.data.tensors import TensorPart, image_tensors
from ngd_workers.models import MODELS
from ngd_workers.tasks import TASKS
from tests.support.data_sets import write_idx, write_image_folder, write_jpeg_npz, write_pairs, write_table, write_text
from tests.support.service_process import NGD, ServiceProcess

TRAINING_S = 300
HERE = "tests.service.test_every_task"
MLP = {"kind": "mlp", "hidden": [8]}
PIXELS = {"size": 16, "augment": {"kind": "none"}}
GPT = {"kind": "gpt", "width": 16, "layers": 1, "heads": 2}


def stripes() -> Dataset:
    """Returns images of which each pixel is to be told whether it is light."""
    x = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.5).long()
    return Dataset(TensorPart(x, y), TensorPart(x[:8], y[:8]), Images(1, 4, 4, 2))


def of_tensors() -> Dataset:
    x = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0.5).long()
    return image_tensors(x, y, x[:8], y[:8], Images(1, 4, 4, 2))


def by_pixel(shape: object) -> nn.Module:
    return nn.Conv2d(1, 2, 1)


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def function(name: str) -> dict[str, str]:
    return {"kind": "function", "function": f"{HERE}:{name}"}


def numbers(**columns: object) -> dict[str, object]:
    return {"kind": "parquet", "train": ["table/train.parquet"], "test": ["table/test.parquet"]} | columns


def saved(**columns: object) -> dict[str, object]:
    return {"kind": "huggingface", "directory": "table/saved"} | columns


TOKENS = {"kind": "tokens", "train": "text.txt", "test_fraction": 0.2, "length": 8, "tokenizer": {"kind": "words"}}
PAIRS = {"kind": "text_pairs", "directory": "pairs", "source": "en", "target": "de", "tokenizer": {"kind": "words"}}
IMAGES = {"images": PIXELS}
JOBS: dict[str, dict[str, Any]] = {
    "digits": {"data": {"kind": "digits"}, "model": MLP},
    "idx": {"data": {"kind": "idx", "directory": "idx"}, "model": {"kind": "small_cnn", "channels": 2, "hidden": 8}},
    "folder": {"data": {"kind": "image_folder", "directory": "pictures"} | IMAGES, "model": MLP},
    "shards": {"data": {"kind": "webdataset", "directory": "shards"} | IMAGES, "model": MLP},
    "npz": {"data": {"kind": "jpeg_npz", "file": "jpeg.npz", "train_samples": 32} | IMAGES, "model": MLP},
    "rows": {"data": numbers(features=["x"], label="class"), "model": MLP},
    "saved-rows": {
        "data": saved(features=["x"], target=["sum"]),
        "model": MLP,
        "task": {"kind": "regression"},
        "metric": "rmse",
    },
    "own-data": {"data": function("of_tensors"), "model": MLP},
    "labels": {
        "data": function("stripes"),
        "model": function("by_pixel"),
        "task": {"kind": "labelling"},
        "metric": "mean_iou",
    },
    "own-step": {"data": function("of_tensors"), "model": MLP, "task": function("step"), "metric": "loss"},
    "text": {"data": TOKENS, "model": GPT, "task": {"kind": "language_modelling"}, "metric": "perplexity"},
    "pairs": {
        "data": PAIRS,
        "model": {"kind": "encoder_decoder", "width": 16, "layers": 1, "heads": 2},
        "task": {"kind": "translation"},
        "metric": "bleu",
    },
}


def spec(name: str) -> dict[str, Any]:
    parts = {key: value for key, value in JOBS[name].items() if key != "metric"}
    return {
        "name": name,
        "optimizer": {"kind": "ngd", "lr": 0.01, "damping": 0.1},
        "schedule": {"steps": 4, "evaluate_every_steps": 2},
        "batch": {"global_size": 8, "micro_size": 4},
        "loading": {"processes": 1},
    } | parts


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_idx(folder / "idx")
    write_image_folder(folder / "pictures")
    write_jpeg_npz(folder / "jpeg.npz")
    write_table(folder / "table")
    write_text(folder / "text.txt")
    write_pairs(folder / "pairs")
    packing = [*NGD, "data", "pack", str(folder / "pictures"), str(folder / "shards"), "--samples-per-shard", "8"]
    subprocess.run(packing, check=True, env=os.environ, capture_output=True, timeout=120)
    return folder


def test_each_task_and_each_source_has_a_job() -> None:
    kinds = {part: {job.get(part, {}).get("kind") for job in JOBS.values()} for part in ("task", "data", "model")}

    assert set(TASKS) <= kinds["task"] | {"image_classification"}
    assert set(SOURCES) | {"function"} <= kinds["data"]
    assert set(MODELS) - {"torchvision", "timm", "transformers"} <= kinds["model"]  # these: test_named_models.py


@pytest.mark.slow
def test_every_job_trains_and_tells_its_own_metrics(
    start_service: Callable[..., ServiceProcess], data_dir: Path
) -> None:
    service = start_service(driver_command=None, data_dir=data_dir)
    jobs = {name: service.client.submit(spec(name)) for name in JOBS}

    for name, job in jobs.items():
        ended = service.client.wait(job.id, timeout_s=TRAINING_S)
        metric = JOBS[name].get("metric", "accuracy")
        assert ended.status.phase == "SUCCEEDED", (name, ended.status.message)
        assert ended.metrics[0].name == metric
        assert ended.status.result is not None
        assert metric in ended.status.result.metrics
        series = service.client.metrics(job.id).series
        assert series["loss"].steps == [1, 2, 3, 4]
        assert series[f"test_{metric}"].steps == [2, 4]

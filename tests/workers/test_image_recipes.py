"""Every recipe of images starts, trains a few steps and resumes: with fewer and smaller images, on a CPU."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ngd_workers.contract.spec import JobSpec
from ngd_workers.contract.spec_file import load_spec
from ngd_workers.launch.attempt import run_rank
from ngd_workers.shards.pack import pack
from tests.support import ROOT
from tests.support.attempts import make_attempt, records, spooled
from tests.support.small_images import write_image_folder, write_jpeg_npz

RECIPES = sorted((ROOT / "workers" / "ngd_workers" / "recipes").glob("*.yaml"))
OF_IMAGES = {path.stem: path for path in RECIPES if path.stem.startswith(("cifar10", "imagenet"))}
# epochs between which lr falls
TABLE = {"4k": (1, 53), "8k": (1, 53.5), "16k": (1, 53.5), "32k": (1.5, 49.5), "65k": (2, 64.5), "131k": (1, 95)}
NARROW = {"channels": [4, 8, 16, 32], "stem_width": 4}


CLASSES = 40  # of ImageNet's sample, which has one image of each


def extracted(archive: str, into: Path, *, folders: int, each: int) -> None:
    """Extracts the first files of the first folders of an archive below NGD_DATA_DIR."""
    taken: dict[str, int] = {}
    with zipfile.ZipFile(Path(os.environ["NGD_DATA_DIR"]) / archive) as file:
        for name in file.namelist():
            folder = name.rpartition("/")[0]
            if name.endswith("/") or taken.get(folder, 0) == each or (folder not in taken and len(taken) == folders):
                continue
            taken[folder] = taken.get(folder, 0) + 1
            file.extract(name, into)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the recipes' data: some of the images below NGD_DATA_DIR, or generated ones."""
    root = tmp_path_factory.mktemp("data")
    if given := os.environ.get("NGD_DATA_DIR"):
        (root / "cifar10").symlink_to(Path(given) / "cifar10")
        extracted("imagenette112.zip", root / "imagenette112", folders=20, each=4)
        for part in ("train", "val"):
            archive = "imagenet1k-sample/imagenet1k_short128_q85.zip"
            extracted(archive, root / "imagenet" / part, folders=CLASSES, each=1)
    else:
        write_jpeg_npz(root / "cifar10" / "cifar10_jpeg75.npz", samples=80, classes=10)
        write_image_folder(root / "imagenette112", classes=10, train=4, test=2)
        write_image_folder(root / "imagenet", classes=CLASSES, train=1, test=1)
    pack(root / "imagenet", root / "imagenet-shards", ("train", "val"), lambda *progress: None, samples_per_shard=10)
    return root


def reduced(path: Path, width: str) -> JobSpec:
    """Returns the recipe for a few steps on a CPU; task, optimizer and form of the data stay."""
    content: dict[str, Any] = load_spec(path).model_dump(mode="json")
    content["batch"] = {"global_size": 16, "micro_size": 8}
    content["schedule"] |= {"epochs": None, "steps": 3, "evaluate_every_steps": None, "warmup_steps": 0}
    content["checkpoint"] |= {"every_steps": 2}
    content["resources"] = {}
    content["loading"] = {}
    content["data"]["images"] |= {"size": 32, "resize": None}
    if content["data"]["kind"] == "jpeg_npz":
        content["data"]["train_samples"] = 59_960 if "NGD_DATA_DIR" in os.environ else 40
    if width == "narrow":
        content["model"] |= {"kind": "timm", "options": NARROW}
    if content["optimizer"]["kind"] == "ngd":
        content["optimizer"]["max_dense"] = 64  # wider factors would take seconds each to invert
    return JobSpec.model_validate(content)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *((name, "narrow") for name in OF_IMAGES if "resnet" in name),
        *(pytest.param(name, "whole", marks=pytest.mark.slow) for name in OF_IMAGES),
    ],
)
def test_recipe_starts_trains_and_resumes(tmp_path, data_dir, name, width):
    spec = reduced(OF_IMAGES[name], width)
    first = make_attempt(tmp_path, spec, data_dir=data_dir)

    outcome = run_rank(first)
    (tmp_path / "checkpoints" / "step-00000003" / "state.pt").unlink()  # as if it had been killed before
    second = make_attempt(tmp_path, spec, number=2, data_dir=data_dir)
    resumed = run_rank(second)

    assert (outcome.message, outcome.step) == (None, 3)
    assert (resumed.message, resumed.step) == (None, 3)
    assert spooled(second)[0].resumed_step == 2
    assert [record.step for record in records(spooled(second))] == [3]
    assert spec.target.metric in resumed.metrics


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if f"{name}-sgd" in OF_IMAGES])
def test_baseline_differs_from_its_recipe_in_the_optimizer_alone(name):
    ngd, sgd = load_spec(OF_IMAGES[name]), load_spec(OF_IMAGES[f"{name}-sgd"])

    same = {"name": "", "optimizer": ngd.optimizer}
    assert ngd.model_copy(update=same) == sgd.model_copy(update=same)


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if name.startswith("imagenet-")])
def test_lr_falls_in_the_epochs_of_sp_ngd_s_table(name):
    size = name.rpartition("-")[2]
    start, end = TABLE[size]
    spec = load_spec(OF_IMAGES[name])

    schedule = spec.schedule
    assert schedule.lr.start_fraction * schedule.epochs == pytest.approx(start, abs=1e-3)
    assert schedule.lr.end_fraction * schedule.epochs == pytest.approx(end, abs=1e-3)
    assert spec.batch.global_size == 2**12 * 2 ** ["4k", "8k", "16k", "32k", "65k", "131k"].index(size)

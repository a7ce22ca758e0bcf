"""The card of a job's model, and the short run that sets a device's rates."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ngd_dist.cost.calibration import calibrated
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.cluster import PRESETS
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import JobSpec
from ngd_workers.data import Images, TokenSequences, Vectors, load_dataset
from ngd_workers.launch import measuring
from ngd_workers.launch.model_card import card_of_job, card_without_data, shape_of
from ngd_workers.train.learner import Learner
from ngd_workers.train.loading import MicroBatch
from tests.support.attempts import small_spec

NGD = {"kind": "ngd", "lr": 0.01, "damping": 0.1}
CASES: list[tuple[dict[str, Any], str, int]] = [
    ({"kind": "mlp", "hidden": [32]}, "images:1x8x8:10", 65 * 32 + 33 * 10),
    ({"kind": "small_cnn", "channels": 4, "hidden": 8}, "images:1x8x8:10", 1294),
    ({"kind": "gpt", "layers": 1, "width": 8, "heads": 2}, "tokens:50x16", 1816),
    ({"kind": "torchvision", "name": "resnet18"}, "images:3x64x64:1000", 11_689_512),
    ({"kind": "timm", "name": "resnet18"}, "images:3x64x64:1000", 11_689_512),
]


def card_of(model: dict[str, Any], shape: str) -> ModelCard:
    return card_without_data(small_spec(model=model, optimizer=NGD), shape_of(shape), samples=100)


@pytest.mark.parametrize(("model", "shape", "parameters"), CASES, ids=[model["kind"] for model, _, _ in CASES])
def test_models_have_cards_without_their_data(model: dict[str, Any], shape: str, parameters: int) -> None:
    card = card_of(model, shape)

    assert (card.parameters, card.samples) == (parameters, 100)
    assert card.forward_flops > 0
    assert card.activation_bytes > 0


def test_the_data_tell_shape_and_number() -> None:
    spec = small_spec(optimizer=NGD)

    card = card_of_job(spec, load_dataset(spec.data, None))

    assert card.samples == 1437
    assert card == card_without_data(spec, Images(1, 8, 8, 10), samples=1437)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("images:3x4x5:6", Images(3, 4, 5, 6)),
        ("vectors:7:2", Vectors(7, 2)),
        ("tokens:50257x1024", TokenSequences(50257, 1024)),
    ],
)
def test_shapes_have_a_short_form(text: str, shape: object) -> None:
    assert shape_of(text) == shape


@pytest.mark.parametrize("text", ["images:3x4x5", "tokens:5x6x7", "pixels:1x1", "vectors:0:2", "vectors:a:b", ""])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="--shape must be one of images:3x224x224:1000"):
        shape_of(text)


def measured_job(**changes: Any) -> JobSpec:
    return small_spec(**({"optimizer": NGD, "batch": {"global_size": 64, "micro_size": 32}} | changes))


class CountedWork:
    """A clock that load can't disturb: a second passes for each sample of a backward pass, and with each reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seconds, backward = 0.0, Learner.backward

        def counted(learner: Learner, batches: Sequence[MicroBatch]) -> object:
            self._seconds += sum(batch.samples for batch in batches)
            return backward(learner, batches)

        monkeypatch.setattr(time, "process_time", self.read)
        monkeypatch.setattr(Learner, "backward", counted)

    def read(self) -> float:
        self._seconds += 1.0
        return self._seconds


def test_a_short_run_sets_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CYCLES", 3)
    CountedWork(monkeypatch)
    spec = measured_job(batch={"global_size": 512, "micro_size": 512})
    card = card_of_job(spec, load_dataset(spec.data, None))

    run = measuring.measured(spec, card, None)

    assert {(step.samples, step.refreshes) for step in run.steps} == {
        (samples, refreshes) for samples in (128, 512) for refreshes in (False, True)
    }
    assert run.at(128, refreshes=True).seconds > run.at(128, refreshes=False).seconds
    assert {"apply", "update", "refresh"} <= run.steps[0].phases.keys()
    device = calibrated(PRESETS["cpu"], type(run).model_validate_json(run.model_dump_json()))
    assert device.name == "cpu"
    assert device != PRESETS["cpu"]


@pytest.mark.parametrize(
    "optimizer",
    [
        {"kind": "ngd", "step_length": {"kind": "quadratic_model"}, "damping_rule": {"kind": "levenberg_marquardt"}},
        {"kind": "ngd", "lr": 0.01, "preconditioner": {"kind": "seng"}},
        {"kind": "ngd", "lr": 0.01, "preconditioner": {"kind": "kfac", "rows": 8}},
    ],
)
def test_settings_that_bind_others_are_measured_and_read_again(
    monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any]
) -> None:
    monkeypatch.setattr(measuring, "CYCLES", 1)
    spec = measured_job(optimizer=optimizer)

    run = measuring.measured(spec, card_of_job(spec, load_dataset(spec.data, None)), None)

    assert type(run).model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"kind": "sgd"}}, "measured with optimizer ngd, got sgd"),
        ({"batch": {"global_size": 64, "micro_size": 1}}, "batch.micro_size must be 2 at least, got 1"),
    ],
)
def test_a_run_that_can_not_be_measured_is_refused(changes: dict[str, Any], words: str) -> None:
    spec = measured_job(**changes)
    card = card_of_job(spec, load_dataset(spec.data, None))

    with pytest.raises(SpecError, match=words):
        measuring.measured(spec, card, None)


def test_the_command_refuses_a_loop_of_its_own(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: own\ntrain: {function: 'a.b:c'}\n")

    command = [sys.executable, "-m", "ngd_workers.launch.model_card", str(job)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("the planner can't count its steps")

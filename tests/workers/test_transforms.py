"""A job under SNGD: it learns, goes on to the same bits, and everything that leaves it has plain weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import JobSpec
from ngd_workers.launch.attempt import run_rank
from ngd_workers.launch.export import rebuilt
from ngd_workers.report.reporter import SilentReporter
from ngd_workers.train.context import TrainContext
from ngd_workers.train.loop import Run
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.optimizers import DEEP, OPTIMIZERS
from tests.support.parameters import rest_is_slow
from tests.support.ranks import run_ranks
from tests.support.training import weights_at

CNN = {"kind": "small_cnn", "channels": 8, "hidden": 32}
SNGD = {"kind": "sngd", "T": 3}
CHOICE = {"kind": "sgd", "lr": 0.03}
PLAIN = [kind for kind, choice in OPTIMIZERS.items() if kind not in ("ngd", "soap", "shampoo")]


def sngd_spec(**changes: Any) -> JobSpec:
    return small_spec(**{"model": CNN, "optimizer": CHOICE, "transform": SNGD} | changes)


def run(folder: Path, spec: JobSpec, number: int = 1) -> AttemptDir:
    attempt = make_attempt(folder, spec, number)
    outcome = run_rank(attempt)
    assert outcome.result == "succeeded", outcome.message
    return attempt


def same(folder: Path, other: Path, step: int) -> bool:
    found, expected = weights_at(folder, step), weights_at(other, step)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", PLAIN)
def test_digits_are_learned(tmp_path: Path, kind: str) -> None:
    spec = sngd_spec(optimizer=OPTIMIZERS[kind] if kind != "sgd" else CHOICE, schedule={"epochs": 3})

    outcome = run_rank(make_attempt(tmp_path, spec))

    assert outcome.metrics["accuracy"] > 0.85, outcome.message


@pytest.mark.parametrize("kind", rest_is_slow(PLAIN, "sgd", "adamw"))
def test_every_plain_optimizer_resumes_to_the_bit(tmp_path: Path, kind: str) -> None:
    spec = sngd_spec(model=DEEP, optimizer=OPTIMIZERS[kind])
    run(tmp_path / "whole", spec)

    run(tmp_path / "cut", spec)
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "state.pt").write_bytes(b"lost")
    resumed = run(tmp_path / "cut", spec, number=2)

    assert spooled(resumed)[0].resumed_step == 6
    assert same(tmp_path / "cut", tmp_path / "whole", 8)


def test_a_checkpoint_has_the_plain_model(tmp_path: Path) -> None:
    attempt = run(tmp_path / "sngd", sngd_spec(model=DEEP))
    run(tmp_path / "plain", sngd_spec(model=DEEP, transform=None))

    weights = weights_at(tmp_path / "sngd", 8)

    assert weights.keys() == weights_at(tmp_path / "plain", 8).keys()
    tested = next(event.metrics for event in spooled(attempt) if event.kind == "evaluation" and event.step == 8)
    init = {"kind": "checkpoint", "run_dir": "sngd"}
    still = {"optimizer": {"kind": "sgd", "lr": 1e-12}, "schedule": {"steps": 1}}
    outcome = run_rank(make_attempt(tmp_path / "again", sngd_spec(model=DEEP, transform=None, init_from=init, **still)))
    assert outcome.metrics["loss"] == pytest.approx(tested["loss"], rel=1e-5)


def test_an_exported_model_is_the_trained_one(tmp_path: Path) -> None:
    spec = sngd_spec()
    context = TrainContext(
        comm=Communicator(),
        device=torch.device("cpu"),
        run_dir=tmp_path,
        data_dir=None,
        attempt=1,
        reporter=SilentReporter(),
    )
    training = Run(spec, context)
    for _ in range(5):
        training.step_once()
    snapshot = training.learner.snapshot({}, None, training._facts)
    training.close()
    assert snapshot.weights is not None
    assert snapshot.model is not None
    save_file(dict(snapshot.weights), tmp_path / "weights.safetensors")
    card = {"spec": spec.model_dump(mode="json"), "model": snapshot.model.model_dump(mode="json")}
    (tmp_path / "card.json").write_text(json.dumps(card))

    model, _ = rebuilt(tmp_path)

    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), training.learner.model.eval()(x))


def test_a_fork_goes_on_to_the_bits_of_one_job(tmp_path: Path) -> None:
    long, everything = {"steps": 10}, {"kind": "checkpoint", "run_dir": "first", "takes": "everything"}
    run(tmp_path / "whole", sngd_spec(schedule=long))
    run(tmp_path / "first", sngd_spec(schedule={"steps": 5}))

    run(tmp_path / "second", sngd_spec(schedule=long, init_from=everything))

    assert same(tmp_path / "second", tmp_path / "whole", 10)


@pytest.mark.parametrize("there", [SNGD, None])
def test_momentum_does_not_go_on_in_other_coordinates(tmp_path: Path, there: Any) -> None:
    here = None if there else SNGD
    run(tmp_path / "first", sngd_spec(transform=there, schedule={"steps": 2}))
    init = {"kind": "checkpoint", "run_dir": "first", "takes": "everything"}

    outcome = run_rank(make_attempt(tmp_path / "second", sngd_spec(transform=here, init_from=init)))

    assert (outcome.result, outcome.reason) == ("failed", "InvalidSpec")
    assert "take weights alone" in (outcome.message or "")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_products_in_16_bits_train_almost_as_well(tmp_path: Path, precision: str) -> None:
    losses = []
    for each in ("fp32", precision):
        attempt = run(tmp_path / each, sngd_spec(model=DEEP, precision=each))
        losses.append([record.metrics["loss"] for record in records(spooled(attempt))])

    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def trained(rank: int, world_size: int, folder: Path) -> list[float]:
    engine = {"kind": "ddp"} if world_size > 1 else None
    batch = {"global_size": 64, "micro_size": 16}
    spec = sngd_spec(model=DEEP, engine=engine, resources={"workers": world_size}, batch=batch)
    context = TrainContext(
        comm=Communicator(),
        device=torch.device("cpu"),
        run_dir=folder / str(world_size),
        data_dir=None,
        attempt=1,
        reporter=SilentReporter(),
    )
    training = Run(spec, context)
    for _ in range(6):
        training.step_once()
    training.close()
    return torch.cat([p.detach().double().flatten() for p in training.learner.model.parameters()]).tolist()


@pytest.mark.ranks
def test_two_workers_train_as_one_does(tmp_path: Path) -> None:
    (one,), two = run_ranks(1, trained, tmp_path), run_ranks(2, trained, tmp_path)

    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizer": {"kind": "ngd"}}, "sngd makes steps natural by itself, and optimizer ngd would again"),
        ({"optimizer": {"kind": "soap"}}, "sngd can't take the state of optimizer soap to other coordinates"),
        ({"optimizer": {"kind": "shampoo"}}, "sngd can't take the state of optimizer shampoo to other coordinates"),
        (
            {"engine": {"kind": "fsdp"}, "resources": {"workers": 2}},
            "sngd multiplies whole weights, and engine fsdp leaves a worker a part of each: take engine ddp",
        ),
        (
            {"engine": {"kind": "deepspeed"}, "resources": {"workers": 2}},
            "engine deepspeed leaves a worker a part of each",
        ),
    ],
)
def test_what_it_can_t_act_on_is_refused_when_the_job_is_posted(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        sngd_spec(**changes)


def test_a_model_without_such_a_layer_is_refused(tmp_path: Path) -> None:
    spec = sngd_spec(transform=SNGD | {"max_inputs": 1})

    outcome = run_rank(make_attempt(tmp_path, spec))

    assert (outcome.result, outcome.reason) == ("failed", "InvalidSpec")
    assert "transform sngd doesn't fit the model" in (outcome.message or "")

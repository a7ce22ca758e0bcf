"""A job gives the same model under every engine, and goes on under another one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.spec import JobSpec
from ngd_workers.report.reporter import SilentReporter
from ngd_workers.train.context import TrainContext
from ngd_workers.train.loop import Run
from tests.support.attempts import small_spec
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks

STEPS = 6
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.1},
    "adamw": {"kind": "adamw", "lr": 0.01},
    "ngd": {"kind": "ngd", "lr": 0.05, "damping": 0.1, "staleness": {"kind": "fixed", "steps": 2}},
}
ENGINES: dict[str, dict[str, Any]] = {"bare": {"kind": "bare"}, "ddp": {"kind": "ddp"}, "fsdp": {"kind": "fsdp"}}
CASES = [
    (optimizer, engine) for optimizer in OPTIMIZERS for engine in ENGINES if optimizer == "ngd" or engine != "bare"
]


def spec_of(optimizer: str, engine: str | None, workers: int, **changes: Any) -> JobSpec:
    return small_spec(
        model={"kind": "small_cnn", "channels": 4, "hidden": 16},
        optimizer=OPTIMIZERS[optimizer],
        engine=None if engine is None else ENGINES[engine],
        resources={"workers": workers},
        schedule={"steps": STEPS},
        **{"batch": {"global_size": 64, "micro_size": 16}, "checkpoint": {"every_steps": 3}} | changes,
    )


def train(spec: JobSpec, folder: Path, steps: int = STEPS, attempt: int = 1) -> tuple[list[float], list[float]]:
    """Collective. Returns the loss of each step that ran, and the weights after the last, in one list."""
    context = TrainContext(
        comm=Communicator(),
        device=torch.device("cpu"),
        run_dir=folder,
        data_dir=None,
        attempt=attempt,
        reporter=SilentReporter(),
    )
    run, losses = Run(spec, context), []
    reduce = run._reduce
    run._reduce = lambda totals: losses.append(reduce(totals)) or losses[-1]  # type: ignore[method-assign]
    run.resume()
    while run.progress.step < steps:
        run.step_once()
        if run.is_checkpoint_due:
            run.save_checkpoint()
    run.saves.finish()
    whole = run.learner._engine.weights()
    weights = [whole[name].double().flatten() for name, _ in run.learner.model.named_parameters()]
    run.close()
    return [metrics["loss"] for metrics in losses], torch.cat(weights).tolist()


def all_cases(rank: int, world_size: int, folder: Path) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    return {
        case: train(spec_of(*case, workers=world_size), folder / "-".join(case))  # type: ignore[misc]
        for case in CASES
    }


@pytest.fixture(scope="module")
def by_engine(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    return dict(run_ranks(2, all_cases, tmp_path_factory.mktemp("engines"))[0])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_workers_train_as_one_does(by_engine, tmp_path, case):
    losses, weights = train(spec_of(case[0], None, workers=1), tmp_path)

    assert by_engine[case][0] == pytest.approx(losses, rel=1e-4)
    assert by_engine[case][1] == pytest.approx(weights, rel=1e-3, abs=1e-4)


def moved(rank: int, world_size: int, folder: Path, optimizer: str) -> list[list[float]]:
    """Trains half of the steps under each engine, and goes on under the next one; returns the weights at the end."""
    names = [engine for name, engine in CASES if name == optimizer]
    ends = []
    for first, second in zip(names, [*names[1:], names[0]], strict=True):
        train(spec_of(optimizer, first, world_size), folder / first, STEPS // 2)
        ends.append(train(spec_of(optimizer, second, world_size), folder / first, attempt=2)[1])
    return ends


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_job_goes_on_under_another_engine(by_engine, tmp_path, optimizer):
    ends = run_ranks(2, moved, tmp_path, optimizer)[0]

    for weights in ends:
        assert weights == pytest.approx(by_engine[optimizer, "ddp"][1], rel=1e-3, abs=1e-4)


def test_a_checkpoint_of_two_sharded_workers_goes_on_in_one_process(by_engine, tmp_path):
    run_ranks(2, half, tmp_path)

    _, weights = train(spec_of("adamw", None, workers=1), tmp_path, attempt=2)

    assert weights == pytest.approx(by_engine["adamw", "ddp"][1], rel=1e-3, abs=1e-4)


def half(rank: int, world_size: int, folder: Path) -> None:
    train(spec_of("adamw", "fsdp", world_size), folder, STEPS // 2)


def in_precision(rank: int, world_size: int, folder: Path, precision: str) -> dict[str, list[float]]:
    engines = ["ddp", "bare"] if precision == "fp16" else ["ddp", "bare", "fsdp"]
    return {
        engine: train(spec_of("ngd", engine, world_size, precision=precision), folder / engine)[0] for engine in engines
    }


@pytest.mark.parametrize(("precision", "rel"), [("bf16", 0.05), ("fp16", 0.02)])
def test_products_in_16_bits_train_almost_as_well(by_engine, tmp_path, precision, rel):
    found = run_ranks(2, in_precision, tmp_path, precision)[0]

    for losses in found.values():
        assert losses == pytest.approx(by_engine["ngd", "ddp"][0], rel=rel)
        assert losses != by_engine["ngd", "ddp"][0]


def test_gradients_of_several_workers_need_somebody_who_averages():
    with pytest.raises(ValidationError, match="engine bare averages no gradients, and optimizer sgd has 2 workers"):
        spec_of("sgd", "bare", 2)


def test_fp16_needs_whole_gradients():
    with pytest.raises(ValidationError, match="precision fp16 is not for engine fsdp: take bf16, or engine ddp"):
        spec_of("adamw", "fsdp", 2, precision="fp16")


def test_one_worker_has_the_bare_model():
    assert spec_of("sgd", "fsdp", 1).effective_engine.kind == "bare"
    assert math.isfinite(spec_of("sgd", None, 1).optimizer.lr)

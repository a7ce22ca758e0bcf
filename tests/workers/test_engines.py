"""A job gives the same model under every engine, and goes on under another one."""

import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.spec import JobSpec
from ngd_workers.launch.attempt import run_rank
from ngd_workers.report.reporter import SilentReporter
from ngd_workers.train.context import TrainContext
from ngd_workers.train.loop import Run
from tests.support.attempts import make_attempt, small_spec
from tests.support.optimizers import OPTIMIZERS as FOR_DIGITS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.ranks

STEPS = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"kind": "sgd", "lr": 0.1, "weight_decay": 0.01},
    "adamw": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "ngd": {"kind": "ngd", "lr": 0.05, "damping": 0.1, "staleness": {"kind": "fixed", "steps": 2}},
}
ENGINES: dict[str, dict[str, Any]] = {
    "bare": {"kind": "bare"},
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
} | {f"zero {stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)}
# Those that need whole weights, and the engines that leave them whole.
WHOLE = {kind: {**FOR_DIGITS[kind]} for kind in ("lars", "lamb", "muon", "soap", "shampoo")}
# Of long axes a batch spans a part: roundoff turns the rest of the basis, and Adam in it takes other steps.
WHOLE["soap"] |= {"max_precondition_dim": 8}
WHOLE_CASES = [*((optimizer, engine) for optimizer in WHOLE for engine in ("ddp", "zero 0")), ("muon", "fsdp")]
ALL_CASES = [
    *((optimizer, engine) for optimizer in OPTIMIZERS for engine in ENGINES if optimizer == "ngd" or engine != "bare"),
    *WHOLE_CASES,
]
CASES = [
    *[("sgd", "zero 3"), ("adamw", "fsdp"), ("adamw", "zero 1")],
    *(("ngd", engine) for engine in ENGINES),
    *((optimizer, "ddp") for optimizer in WHOLE),
    ("muon", "fsdp"),
]
# Each goes on under the next one: every engine's checkpoint is read by another.
RINGS = {
    "sgd": ("ddp", "zero 3", "fsdp"),
    "adamw": ("ddp", "zero 1", "fsdp", "zero 3"),
    "ngd": ("ddp", "fsdp", "zero 3"),
    "muon": ("ddp", "fsdp"),
}
ALL_MOVES = [(optimizer, *pair) for optimizer, ring in RINGS.items() for pair in pairwise([*ring, ring[0]])]
MOVES = [
    *[("ngd", "fsdp", "zero 3"), ("ngd", "zero 3", "ddp"), ("muon", "fsdp", "ddp")],
    *[("adamw", "zero 1", "fsdp"), ("adamw", "fsdp", "zero 3")],
]
PRECISIONS = {"bf16": ("bare", "ddp", "fsdp", "zero 2"), "fp16": ("bare", "ddp")}
ALL_ROUNDED = [(precision, engine) for precision, engines in PRECISIONS.items() for engine in engines]
ROUNDED = [("bf16", "fsdp"), ("fp16", "ddp")]
Trained = tuple[list[float], list[float]]  # the loss of each step, and the weights at the end
Names = list[Any]
Found = dict[tuple[str, ...], Trained]


def half_frozen(shape: Any) -> torch.nn.Module:
    """Returns a classifier of the digits whose first layer stays as it is."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    model[1].requires_grad_(False)
    return model


HALF_FROZEN = {"kind": "function", "function": "tests.workers.test_engines:half_frozen"}
FROZEN = ("zero 1", "fsdp")


def spec_of(optimizer: str, engine: str | None, workers: int, **changes: Any) -> JobSpec:
    return small_spec(
        optimizer=(OPTIMIZERS | WHOLE)[optimizer],
        engine=None if engine is None else ENGINES[engine],
        resources={"workers": workers},
        schedule={"steps": STEPS},
        **{
            "model": {"kind": "small_cnn", "channels": 4, "hidden": 16},
            "batch": {"global_size": 64, "micro_size": 16},
            "checkpoint": {"every_steps": 2},
        }
        | changes,
    )


def train(spec: JobSpec, folder: Path, steps: int = STEPS, attempt: int = 1) -> Trained:
    """Collective. Returns the loss of each step that ran, and the weights after the last."""
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


def everything(rank: int, world_size: int, folder: Path, cases: Names, moves: Names, rounded: Names) -> Found:
    """Trains under each engine, goes on under others, and trains in 16 bits; all in one group of processes."""
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray and torchrun do
    found: Found = {}
    for optimizer, engine in cases:
        found[optimizer, engine] = train(spec_of(optimizer, engine, world_size), folder / optimizer / engine)
    for optimizer, first, second in moves:
        place = folder / "moves" / optimizer / first
        train(spec_of(optimizer, first, world_size), place, STEPS // 2)
        if rank == 0:
            shutil.copytree(place, folder / "alone" / optimizer / first)
        found[optimizer, first, second] = train(spec_of(optimizer, second, world_size), place, attempt=2)
    for engine in FROZEN:
        spec = spec_of("adamw", engine, world_size, model=HALF_FROZEN)
        found["frozen", engine] = train(spec, folder / "frozen" / engine, STEPS // 2)
    for precision, engine in rounded:
        spec = spec_of("ngd", engine, world_size, precision=precision)
        found[precision, engine] = train(spec, folder / precision / engine)
    return found


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    folder = tmp_path_factory.mktemp("engines")
    return run_ranks(2, everything, folder, CASES, MOVES, ROUNDED)[0], folder


@pytest.fixture(scope="module")
def the_others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    folder = tmp_path_factory.mktemp("others")
    others = [
        [name for name in all_of if name not in some]
        for all_of, some in [(ALL_CASES, CASES), (ALL_MOVES, MOVES), (ALL_ROUNDED, ROUNDED)]
    ]
    return run_ranks(2, everything, folder, *others)[0], folder


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> tuple[Found, Path]:
    """Returns what two workers have trained, the slow part of it for a slow test alone."""
    is_slow = request.node.get_closest_marker("slow") is not None
    found: tuple[Found, Path] = request.getfixturevalue("the_others" if is_slow else "two_workers")
    return found


def each(all_of: Names, some: Names) -> list[Any]:
    """Returns the cases as parameters of a test; those that are not among `some` are slow."""
    return [pytest.param(name, id="-".join(name), marks=[] if name in some else [pytest.mark.slow]) for name in all_of]


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("one")
    return {optimizer: train(spec_of(optimizer, None, 1), folder / optimizer) for optimizer in (*OPTIMIZERS, *WHOLE)}


@pytest.mark.parametrize("case", each(ALL_CASES, CASES))
def test_two_workers_train_as_one_does(trained, one_worker, case):
    losses, weights = trained[0][case]

    assert losses == pytest.approx(one_worker[case[0]][0], rel=1e-4)
    assert weights == pytest.approx(one_worker[case[0]][1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("move", each(ALL_MOVES, MOVES))
def test_a_job_goes_on_under_another_engine(trained, one_worker, move):
    losses, weights = trained[0][move]

    assert losses == pytest.approx(one_worker[move[0]][0][STEPS // 2 :], rel=1e-4)
    assert weights == pytest.approx(one_worker[move[0]][1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("move", each(ALL_MOVES, MOVES))
def test_a_job_of_two_workers_goes_on_in_one_process(trained, one_worker, tmp_path, move):
    place = tmp_path / "alone"
    shutil.copytree(trained[1] / "alone" / move[0] / move[1], place)

    _, weights = train(spec_of(move[0], None, 1), place, attempt=2)

    assert weights == pytest.approx(one_worker[move[0]][1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("engine", FROZEN)
def test_frozen_parameters_keep_their_places_in_the_state(two_workers, tmp_path, engine):
    place = tmp_path / "alone"
    shutil.copytree(two_workers[1] / "frozen" / engine, place)
    spec = spec_of("adamw", None, 1, model=HALF_FROZEN)

    losses, weights = train(spec, place, attempt=2)

    whole = train(spec, tmp_path / "whole")
    assert losses == pytest.approx(whole[0][STEPS // 2 :], rel=1e-4)
    assert weights == pytest.approx(whole[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", each(ALL_ROUNDED, ROUNDED))
def test_products_in_16_bits_train_almost_as_well(trained, one_worker, case):
    losses, _ = trained[0][case]

    assert losses == pytest.approx(one_worker["ngd"][0], rel=0.05)
    assert losses != pytest.approx(one_worker["ngd"][0], rel=1e-5)


def test_gradients_of_several_workers_need_somebody_who_averages():
    with pytest.raises(ValidationError, match="engine bare averages no gradients, and optimizer sgd has 2 workers"):
        spec_of("sgd", "bare", 2)


def test_fp16_needs_whole_gradients():
    with pytest.raises(ValidationError, match="precision fp16 is not for engine fsdp: take bf16, or engine ddp"):
        spec_of("adamw", "fsdp", 2, precision="fp16")


def test_one_worker_has_the_bare_model_and_says_so(tmp_path, caplog):
    spec = spec_of("sgd", "fsdp", 1)

    with caplog.at_level("INFO"):
        run_rank(make_attempt(tmp_path, spec))

    assert spec.effective_engine.kind == "bare"
    assert "engine fsdp is left out: one process alone trains the bare model" in caplog.text


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping must be left out, got 1.0"),
        ({"train_batch_size": 64}, "batch.global_size of the job decides it"),
        ({"zero_optimization": {"stage": 1}}, "engine.stage decides it"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload is not supported"),
        ({"zero_optimization": 2}, "zero_optimization must be an object of settings, got 2"),
    ],
)
def test_keys_of_deepspeed_that_the_job_decides_are_refused(config, problem):
    with pytest.raises(ValidationError, match=problem):
        small_spec(engine={"kind": "deepspeed", "config": config}, resources={"workers": 2})


@pytest.mark.parametrize(
    ("engine", "settings", "problem"),
    [
        ("fsdp", {"step_length": {"kind": "layer_wise"}}, "step_length layer_wise reads whole directions"),
        ("zero 2", {"damping_rule": {"kind": "levenberg_marquardt"}}, "damping_rule levenberg_marquardt evaluates"),
        ("zero 3", {"fisher": {"kind": "monte_carlo"}}, "for which ZeRO 3 gathers no weights"),
        ("zero 0", {"damping_rule": {"kind": "levenberg_marquardt"}}, "can't run inside engine deepspeed's step"),
    ],
)
def test_settings_that_an_engine_cannot_act_on_are_refused_when_the_job_is_posted(engine, settings, problem):
    with pytest.raises(ValidationError, match=problem):
        small_spec(optimizer={"kind": "ngd"} | settings, engine=ENGINES[engine], resources={"workers": 2})

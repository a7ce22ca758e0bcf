import json
import re

import pytest
import torch
import torch.distributed as dist

from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import CollectiveError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import JobSpec
from ngd_workers.data import load_dataset
from ngd_workers.launch.attempt import run_rank
from ngd_workers.report.reporter import SilentReporter
from ngd_workers.tasks import build_task
from ngd_workers.train.context import TrainContext
from ngd_workers.train.learner import Learner
from ngd_workers.train.loop import Run
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.ranks import run_ranks, run_survivors
from tests.support.ways_out import gloo_threads

pytestmark = pytest.mark.ranks

CNN = {"kind": "small_cnn", "channels": 8, "hidden": 32}
OPTIMIZERS = {
    "sgd": {"kind": "sgd", "lr": 0.1},
    "ngd": {"kind": "ngd", "lr": 0.01, "damping": 0.01},
    "adaptive": {
        "kind": "ngd",
        "damping": 1.0,
        "fisher": {"kind": "exact"},  # labels drawn on a rank depend on the rank
        "step_length": {"kind": "quadratic_model"},
        "damping_rule": {"kind": "levenberg_marquardt", "every": 2},
    },
}


def run(rank: int, world_size: int, attempt_dir: AttemptDir) -> dict[str, object]:
    return run_rank(attempt_dir).model_dump(exclude={"seconds"})


def curve(attempt_dir: AttemptDir) -> list[float]:
    return [record.metrics["loss"] for record in records(spooled(attempt_dir))]


def split(workers: int, optimizer: str) -> JobSpec:
    """Returns a job whose micro-batches, and so batch norm, are the same on one worker and on two."""
    return small_spec(
        model=CNN,
        optimizer=OPTIMIZERS[optimizer],
        batch={"global_size": 64, "micro_size": 32},
        resources={"workers": workers},
    )


def averaged_buffers(rank: int, world_size: int, attempt_dir: AttemptDir) -> list[float]:
    spec = attempt_dir.read_spec()
    norm = torch.nn.BatchNorm2d(1)
    data = load_dataset(spec.data, None)
    learner = Learner(norm, build_task(spec.task, data.shape), data, spec, Communicator(), torch.device("cpu"))
    norm.running_mean.fill_(float(rank))
    learner.average_buffers()
    return norm.running_mean.tolist()


def test_running_statistics_become_the_mean_over_ranks(tmp_path):
    attempt = make_attempt(tmp_path, split(2, "ngd"))

    assert run_ranks(2, averaged_buffers, attempt) == [[0.5], [0.5]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_ranks_have_the_loss_curve_of_one(tmp_path, optimizer):
    one = make_attempt(tmp_path / "one", split(1, optimizer))
    two = make_attempt(tmp_path / "two", split(2, optimizer))

    run_rank(one)
    outcomes = run_ranks(2, run, two)

    assert outcomes[0] == outcomes[1]
    # float32 sums in another order, over eight steps of training that amplify it
    assert curve(two) == pytest.approx(curve(one), rel=1e-3)


def test_ranks_go_on_from_a_checkpoint_of_another_number_of_ranks(tmp_path):
    whole = make_attempt(tmp_path / "whole", split(1, "ngd"))
    run_rank(whole)
    first = make_attempt(tmp_path / "cut", split(1, "ngd"))
    run_rank(first)
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "state.pt").unlink()
    second = make_attempt(tmp_path / "cut", split(2, "ngd"), number=2)

    run_ranks(2, run, second)

    assert curve(second) == pytest.approx(curve(whole)[6:], rel=1e-3)


def trained(rank: int, world_size: int, attempt_dir: AttemptDir) -> tuple[dict[str, bytes], list[tuple[float, ...]]]:
    """Returns the bits of the weights after each step's update, and lr, momentum and damping after it."""
    context = TrainContext(
        comm=Communicator(),
        device=torch.device("cpu"),
        run_dir=attempt_dir.read_facts().run_dir,
        data_dir=None,
        attempt=1,
        reporter=SilentReporter(),
    )
    training = Run(attempt_dir.read_spec(), context)
    adapted = []
    while not training.is_finished:
        training.step_once()
        (group,) = training.learner.optimizer.param_groups
        adapted.append((group["lr"], group["momentum"], group["damping"]))
    weights = {name: p.detach().numpy().tobytes() for name, p in training.learner.model.named_parameters()}
    return weights, adapted


def test_ranks_that_adapt_do_not_drift_by_one_bit(tmp_path):
    attempt = make_attempt(tmp_path, split(2, "adaptive"))

    (first_weights, first_adapted), (second_weights, second_adapted) = run_ranks(2, trained, attempt)

    assert first_adapted == second_adapted
    assert first_weights == second_weights
    assert len(set(first_adapted)) == 8


def absent_on_rank_1(**options: object) -> object:
    import torch.distributed as dist

    from ngd_workers.contract.spec import Digits
    from ngd_workers.data.digits import load

    if dist.get_rank() == 1:
        raise FileNotFoundError("this machine has no data")
    return load(Digits(), None)


def test_failure_of_one_rank_in_preparation_ends_all_with_its_message(tmp_path):
    data = {"kind": "function", "function": "tests.workers.test_loop_ranks:absent_on_rank_1"}
    attempt = make_attempt(tmp_path, small_spec(data=data, resources={"workers": 2}))

    outcomes = run_ranks(2, run, attempt)

    assert outcomes[0] == outcomes[1]
    assert re.search("this machine has no data", json.dumps(outcomes[0]))


def ended(rank: int, world_size: int, attempts: dict[str, AttemptDir]) -> tuple[dict[str, object], list[str]]:
    """Returns what became of each attempt in one process, and gloo's threads after the last and its group's end."""
    found: dict[str, object] = {}
    for name, attempt in attempts.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "raised" and rank == 1:
                patch.setattr(Run, "evaluate", raise_an_error)
            try:
                found[name] = run_rank(attempt).result
            except (CollectiveError, ZeroDivisionError) as error:
                found[name] = type(error).__name__
    dist.destroy_process_group()
    return found, gloo_threads()


def raise_an_error(self: Run) -> None:
    raise ZeroDivisionError


def test_no_thread_of_gloo_is_left_however_the_loop_ends(tmp_path):
    made = {name: make_attempt(tmp_path / name, split(2, "ngd")) for name in ("succeeded", "cancelled", "raised")}
    made["cancelled"].stop.touch()

    first, second = run_survivors(2, ended, made, doomed=set(), timeout_s=60).values()

    for found, threads in (first, second):
        assert found | {"raised": ""} == {"succeeded": "succeeded", "cancelled": "cancelled", "raised": ""}
        assert threads == []
    assert {first[0]["raised"], second[0]["raised"]} == {"CollectiveError", "ZeroDivisionError"}

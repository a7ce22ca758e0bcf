"""Workers that are asked to start again in another number stop together, lose no step, and go on as one run."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ngd_workers.contract.errors import SpecError, SupersededError
from ngd_workers.contract.events import WorkersResized
from ngd_workers.contract.rundir import AttemptDir, Outcome
from ngd_workers.contract.spec import JobSpec, LoopSpec
from ngd_workers.data import Dataset, Vectors
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.loop import Run
from ngd_workers.train.own_loop import LoopContext
from ngd_workers.train.stopping import STOP_CODES, request_of, stop_code_of
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.ranks import run_ranks
from tests.support.training import weights_at

HERE = "tests.workers.test_resizing"
STEPS = 12


def points(**options: Any) -> Dataset:
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    return Dataset(train=samples, test=samples, shape=Vectors(width=6, outputs=2))


def net(shape: Vectors, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def job(**changes: Any) -> JobSpec:
    """Returns an elastic job in float64, with statistics that are in use for four steps."""
    optimizer = {"kind": "ngd", "lr": 0.1, "damping": 0.01, "staleness": {"kind": "fixed", "steps": 4}}
    parts = {
        "model": {"kind": "function", "function": f"{HERE}:net"},
        "data": {"kind": "function", "function": f"{HERE}:points"},
        "optimizer": optimizer,
        "batch": {"global_size": 32},
        "schedule": {"steps": STEPS, "evaluate_every_steps": 5},
        "checkpoint": {"every_steps": 100},
        "resources": {"min_workers": 1, "max_workers": 2},
    }
    return small_spec(**parts | changes)


def group(rank: int, world_size: int, attempt: AttemptDir, stop_after: int, before: int = 0) -> dict[str, Any]:
    """Runs a group of workers that is asked for another size in the step `stop_after`; returns this rank's outcome."""
    attempt.resize.unlink(missing_ok=True)
    step_once = Run.step_once

    def asked_once(run: Run) -> None:
        if run.progress.step + 1 == stop_after and rank == 0:
            attempt.resize.touch()
            while run.context.reporter.stop_request != "resized":
                time.sleep(0.01)
        step_once(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step_once", asked_once)
        told = WorkersResized(before=before, after=world_size, message="asked for by a test")
        return run_rank(attempt, on_restart=told).model_dump(exclude={"seconds"})


@pytest.mark.ranks
def test_run_of_three_sizes_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = make_attempt(tmp_path / "whole", job())
    run_rank(whole)
    attempt = make_attempt(tmp_path / "cut", job())

    first = run_ranks(2, group, attempt, 3)
    second = group(0, 1, attempt, 6, 2)
    third = run_ranks(2, group, attempt, 0, 1)

    assert first[0] == first[1]
    ends = [(outcome["result"], outcome["step"]) for outcome in (first[0], second, third[0])]
    assert ends == [("resized", 3), ("resized", 6), ("succeeded", STEPS)]
    events = spooled(attempt)
    assert [record.step for record in records(events)] == list(range(1, STEPS + 1))
    assert [e.step for e in events if e.kind == "evaluation"] == [5, 10, STEPS]
    assert [(e.world_size, e.resumed_step) for e in events if e.kind == "started"] == [(2, 0), (1, 3), (2, 6)]
    assert [(e.before, e.after) for e in events if e.kind == "workers_resized"] == [(2, 1), (1, 2)]
    curve, expected = ([r.metrics["loss"] for r in records(spooled(one))] for one in (attempt, whole))
    assert curve == pytest.approx(expected, rel=1e-12)
    ages, ages_expected = ([r.ages for r in records(spooled(one))] for one in (attempt, whole))
    assert ages == ages_expected  # statistics were neither lost nor measured anew
    ended, ended_whole = (weights_at(tmp_path / name, STEPS) for name in ("cut", "whole"))
    for name, weight in ended_whole.items():
        torch.testing.assert_close(ended[name], weight, rtol=1e-10, atol=1e-12)


def test_step_that_is_due_for_a_test_is_tested_before_the_workers_go(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, job(resources={"workers": 1}))

    assert group(0, 1, attempt, 5)["result"] == "resized"
    assert [event.step for event in spooled(attempt) if event.kind == "evaluation"] == [5]


def test_job_that_ends_with_the_step_has_ended(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, job(resources={"workers": 1}))

    outcome = group(0, 1, attempt, STEPS)

    assert (outcome["result"], outcome["step"]) == ("succeeded", STEPS)


def counts(context: LoopContext) -> None:
    state = context.resume() or {"sum": 0}
    for step in range(context.step + 1, 7):
        state["sum"] += step
        context.report({"loss": float(state["sum"])})
        if context.should_stop():
            context.checkpoint(state)
            assert not context.was_cancelled
            return


def test_own_loop_is_called_anew_and_goes_on(tmp_path: Path) -> None:
    loop = {"function": f"{HERE}:counts"}
    resources = {"min_workers": 1, "max_workers": 3}
    spec = LoopSpec.model_validate({"name": "own", "train": loop, "resources": resources})
    attempt = make_attempt(tmp_path, spec)
    attempt.resize.touch()

    first = run_rank(attempt)
    attempt.resize.unlink()
    second = run_rank(attempt)

    assert (first.result, first.step) == ("resized", 1)
    assert (second.result, second.step, second.metrics) == ("succeeded", 6, {"loss": 21.0})
    assert [record.step for record in records(spooled(attempt))] == list(range(1, 7))


def context_of(request: str | None, *, is_told: bool = False) -> Any:
    return SimpleNamespace(reporter=SimpleNamespace(stop_request=request), is_told_to_end=lambda: is_told, attempt=1)


@pytest.mark.parametrize(
    ("requests", "strongest"),
    [
        ([None, None], None),
        (["resized", None], "resized"),
        (["resized"] * 4096, "resized"),
        (["cancelled", "resized"], "cancelled"),
        (["cancelled"] * 4096, "cancelled"),
    ],
)
def test_strongest_request_of_any_number_of_ranks_counts(requests: list[str | None], strongest: str | None) -> None:
    total = torch.tensor([stop_code_of(context_of(request)) for request in requests], dtype=torch.float64).sum()

    assert request_of(float(total), context_of(None)) == strongest


def test_later_attempt_ends_this_one_whatever_else_is_asked() -> None:
    total = STOP_CODES["superseded"] + sum(stop_code_of(context_of("resized", is_told=True)) for _ in range(9))

    with pytest.raises(SupersededError, match="attempt 1 stops"):
        request_of(total, context_of(None))


def told(rank: int, world_size: int, attempt: AttemptDir) -> dict[str, Any]:
    """Runs a rank; the last of them gets a signal at its third step."""
    steps = iter(range(100))
    outcome = run_rank(attempt, is_told_to_end=lambda: rank == world_size - 1 and next(steps) == 2)
    return outcome.model_dump(include={"result", "step"})


@pytest.mark.ranks
def test_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    attempt = make_attempt(tmp_path, job())

    assert run_ranks(2, told, attempt) == [{"result": "cancelled", "step": 3}] * 2
    assert weights_at(tmp_path, 3)


def test_group_of_a_size_that_does_not_divide_says_which_do(tmp_path: Path) -> None:
    spec = job(resources={"min_workers": 2, "max_workers": 4})
    outcome = run_rank(make_attempt(tmp_path, spec))

    assert outcome == Outcome(
        result="failed",
        reason=SpecError.reason,
        message="the spec doesn't fit 1 processes: it runs with 2 or 4 workers, got 1; start as many",
    )

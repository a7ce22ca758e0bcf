"""The loop of one's own in the guide: it learns, and goes on at another number of ranks."""

import pytest

from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import LoopSpec
from ngd_workers.contract.spec_problems import parse_spec
from ngd_workers.launch.attempt import run_rank
from tests.support.attempts import make_attempt, records, spooled
from tests.support.ranks import run_ranks


def job(workers: int = 1, **changes: object) -> LoopSpec:
    train = {"function": "examples.jobs.own_loop:train", "options": {"width": 16, "steps": 100}, "steps": 100}
    spec = parse_spec({"name": "sine", "train": train, "resources": {"workers": workers}} | changes)
    assert isinstance(spec, LoopSpec)
    return spec


def ran(rank: int, world_size: int, attempt: AttemptDir) -> dict[str, object]:
    return run_rank(attempt).model_dump(exclude={"seconds"})


def test_own_loop_learns_and_stops_at_its_target(tmp_path):
    attempt = make_attempt(tmp_path, job(target={"metric": "loss", "value": 0.1, "stop": True}))

    outcome = run_rank(attempt)

    assert outcome.result == "succeeded", outcome.message
    assert outcome.target_step == outcome.step
    assert outcome.metrics["loss"] <= 0.1 < records(spooled(attempt))[0].metrics["loss"]


@pytest.mark.ranks
def test_own_loop_goes_on_at_another_world_size(tmp_path):
    first = make_attempt(tmp_path, job(workers=2))
    run_ranks(2, ran, first)
    (tmp_path / "checkpoints" / "step-00000100" / "state.pt").write_bytes(b"lost")
    second = make_attempt(tmp_path, job(), number=2)

    outcome = run_rank(second)

    assert outcome.result == "succeeded", outcome.message
    assert [record.step for record in records(spooled(second))] == list(range(51, 101))


EQUATION = {
    "name": "poisson",
    "train": {
        "function": "examples.jobs.equation:train",
        "options": {"width": 16, "points": 14, "steps": 40},
        "steps": 40,
        "metrics": {"error": "lower", "loss": "lower"},
    },
}


@pytest.mark.ranks
def test_equation_is_solved_alike_on_one_worker_and_on_two(tmp_path):
    losses = []
    for workers in (1, 2):
        spec = parse_spec(EQUATION | {"resources": {"workers": workers}})
        attempt = make_attempt(tmp_path / str(workers), spec)
        if workers == 1:
            run_rank(attempt)
        else:
            run_ranks(2, ran, attempt)
        losses.append([record.metrics["loss"] for record in records(spooled(attempt))])

    assert len(losses[0]) == 40
    assert losses[0][-1] < 1e-3 * losses[0][0]
    assert losses[1][:10] == pytest.approx(losses[0][:10], rel=1e-6)  # later, rounding grows with the steps


@pytest.mark.ranks
def test_posterior_is_found_alike_on_one_worker_and_on_two(tmp_path):
    pytest.importorskip("gpytorch")
    train = {
        "function": "examples.jobs.posterior:train",
        "options": {"points": 120, "steps": 20},
        "steps": 20,
        "metrics": {"loss": "lower"},
    }
    losses = []
    for workers in (1, 2):
        spec = parse_spec({"name": "posterior", "train": train, "resources": {"workers": workers}})
        attempt = make_attempt(tmp_path / str(workers), spec)
        outcomes = [run_rank(attempt).model_dump()] if workers == 1 else run_ranks(2, ran, attempt)
        assert {outcome["result"] for outcome in outcomes} == {"succeeded"}, outcomes
        losses.append([record.metrics["loss"] for record in records(spooled(attempt))])

    assert len(losses[0]) == 20
    assert losses[0][-1] < 0.6 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

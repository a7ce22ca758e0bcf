"""The loop of one's own in the guide: it learns, and goes on at another number of ranks."""

from pathlib import Path

import pytest

from ngd_workers.contract.events import Evaluation, Event
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


def run_exact(
    run_dir: Path, name: str, metric: str, *, workers: int, number: int = 1, **options: object
) -> list[Event]:
    """Returns the events of an attempt of examples/jobs/{name}.py."""
    train = {"function": f"examples.jobs.{name}:train", "options": options, "steps": options["steps"]}
    train["metrics"] = {"loss": "lower", metric: "lower"}
    spec = parse_spec({"name": name, "seed": 2, "train": train, "resources": {"workers": workers}})
    attempt = make_attempt(run_dir, spec, number=number)
    outcomes = [run_rank(attempt).model_dump()] if workers == 1 else run_ranks(2, ran, attempt)
    assert {outcome["result"] for outcome in outcomes} == {"succeeded"}, outcomes
    return spooled(attempt)


def losses_of(events: list[Event]) -> list[float]:
    return [record.metrics["loss"] for record in records(events)]


@pytest.mark.ranks
def test_mixture_is_fitted_better_from_two_starts_than_from_one(tmp_path):
    runs = [
        run_exact(tmp_path / str(workers), "mixture", "loss", workers=workers, bells=3, steps=60) for workers in (1, 2)
    ]

    one, two = map(losses_of, runs)
    tests = [[event.metrics["loss"] for event in run if isinstance(event, Evaluation)] for run in runs]

    assert one[-1] < 0.5 * one[0]
    assert two[-1] < 0.1 * one[-1]  # the first worker's start leads to a minimum that is not the lowest
    assert [len(of_run) for of_run in tests] == [6, 6]
    assert tests[1][-1] < 1e-3 < tests[0][-1]  # the target of the guide's job


@pytest.mark.ranks
def test_categories_are_learned_by_two_workers_that_go_on_where_they_were_stopped(tmp_path):
    options = {"sizes": [10, 5], "classes": 10, "batch": 256}

    def learn(folder: str, *, steps: int, number: int = 1) -> list[Event]:
        run_dir = tmp_path / folder
        return run_exact(run_dir, "categories", "divergence", workers=2, number=number, steps=steps, **options)

    whole = learn("whole", steps=100)
    learn("parts", steps=50)
    rest = learn("parts", steps=100, number=2)

    tests = [event.metrics["divergence"] for event in whole if isinstance(event, Evaluation)]
    assert len(tests) == 10
    assert tests[-1] < 0.02 < 0.1 < tests[0]
    assert losses_of(rest) == losses_of(whole)[50:]

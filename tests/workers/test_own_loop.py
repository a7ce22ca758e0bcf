"""A training loop of the user's own: all that the service does around ours works around it."""

import re

import pytest
import torch
import torch.distributed as dist

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import LoopSpec
from ngd_workers.contract.spec_problems import SpecProblemsError, parse_spec
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.own_loop import LoopContext
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.ranks import run_ranks, run_survivors


def halves(context: LoopContext) -> None:
    """Trains one number towards 0, with a checkpoint every second step."""
    state = context.resume() or {"x": torch.tensor(1.0)}
    for _ in range(context.step, context.config["steps"]):
        state = {"x": state["x"] / 2}
        context.report({"loss": state["x"], "reward": -state["x"]}, samples=4, lr=0.5)
        if context.step % 2 == 0:
            context.report({"reward": -state["x"]}, test=True)
            context.checkpoint(state)
        if context.should_stop():
            return


def sums_ranks(context: LoopContext) -> None:
    total = torch.tensor(float(context.rank + 1))
    dist.all_reduce(total, group=context.process_group)
    context.report({"loss": total})


def fails_on_rank_1(context: LoopContext) -> None:
    if context.rank == 1:
        raise LookupError("no such thing")
    dist.all_reduce(torch.zeros(1))


def fails(context: LoopContext) -> None:
    context.report({"loss": 1.0})
    raise LookupError("no such thing")


def reports_other(context: LoopContext) -> None:
    context.report({"los": 1.0})


def reports_text(context: LoopContext) -> None:
    context.report({"loss": "low"})


def goes_back(context: LoopContext) -> None:
    context.report({"loss": 1.0}, step=5)
    context.report({"loss": 1.0}, step=5)


def says_nothing(context: LoopContext) -> None:
    pass


def loop_spec(function: str, **changes: object) -> LoopSpec:
    metrics = {"reward": "higher", "loss": "lower", "top_hits": {"better": "higher", "unit": "share"}}
    train = {"function": f"tests.workers.test_own_loop:{function}", "options": {"steps": 6}, "metrics": metrics}
    spec = parse_spec({"name": "own", "train": train} | changes)
    assert isinstance(spec, LoopSpec)
    return spec


def test_loop_reports_its_own_metrics_and_ends_with_its_last_test(tmp_path):
    attempt = make_attempt(tmp_path, loop_spec("halves"))

    outcome = run_rank(attempt)

    events = spooled(attempt)
    assert (outcome.result, outcome.step, outcome.metrics) == ("succeeded", 6, {"reward": -(0.5**6)})
    assert [metric.model_dump() for metric in events[0].metrics] == [
        {"name": "reward", "label": "reward", "better": "higher", "unit": "number"},
        {"name": "loss", "label": "loss", "better": "lower", "unit": "number"},
        {"name": "top_hits", "label": "top hits", "better": "higher", "unit": "share"},
    ]
    assert [(r.step, r.metrics["loss"], r.lr) for r in records(events)] == [(n, 0.5**n, 0.5) for n in range(1, 7)]
    assert [event.step for event in events if event.kind == "checkpoint"] == [2, 4, 6]


def test_loop_goes_on_from_its_newest_whole_checkpoint(tmp_path):
    first = make_attempt(tmp_path, loop_spec("halves"))
    run_rank(first)
    (tmp_path / "checkpoints" / "step-00000006" / "state.pt").write_bytes(b"lost")
    second = make_attempt(tmp_path, loop_spec("halves"), number=2)

    outcome = run_rank(second)

    events = spooled(second)
    assert events[0].resumed_step == 4
    assert [(r.step, r.metrics["loss"]) for r in records(events)] == [(5, 0.5**5), (6, 0.5**6)]
    assert outcome.step == 6


def test_loop_goes_on_from_another_job(tmp_path):
    run_rank(make_attempt(tmp_path / "first", loop_spec("halves")))
    origin = {"kind": "checkpoint", "run_dir": "first", "step": 4, "takes": "everything"}
    second = make_attempt(tmp_path / "second", loop_spec("halves", init_from=origin))

    outcome = run_rank(second)

    events = spooled(second)
    assert events[0].resumed_step == 4
    assert [(r.step, r.metrics["loss"]) for r in records(events)] == [(5, 0.5**5), (6, 0.5**6)]
    assert (outcome.result, outcome.step) == ("succeeded", 6)


def test_loop_needs_a_state_that_a_loop_has_saved(tmp_path):
    run_rank(make_attempt(tmp_path / "first", small_spec()))
    origin = {"kind": "checkpoint", "run_dir": "first", "takes": "everything"}

    outcome = run_rank(make_attempt(tmp_path / "second", loop_spec("halves", init_from=origin)))

    assert (outcome.result, outcome.reason) == ("failed", "IncompatibleCheckpoint")
    assert "first is no job with a loop of its own" in (outcome.message or "")


def test_request_to_stop_cancels_after_the_step(tmp_path):
    attempt = make_attempt(tmp_path, loop_spec("halves"))
    attempt.stop.touch()

    outcome = run_rank(attempt)

    assert (outcome.result, outcome.step) == ("cancelled", 1)


def test_target_in_the_metric_s_own_direction_stops_the_loop(tmp_path):
    target = {"metric": "reward", "value": -0.1, "stop": True}
    attempt = make_attempt(tmp_path, loop_spec("halves", target=target))

    outcome = run_rank(attempt)

    assert (outcome.result, outcome.step, outcome.target_step) == ("succeeded", 4, 4)
    (reached,) = [event for event in spooled(attempt) if event.kind == "target_reached"]
    assert (reached.step, reached.metrics) == (4, {"reward": -0.0625})


def test_loop_that_reports_nothing_still_starts_and_ends(tmp_path):
    attempt = make_attempt(tmp_path, loop_spec("says_nothing"))

    outcome = run_rank(attempt)

    assert (outcome.result, outcome.step, outcome.metrics) == ("succeeded", 0, {})
    assert [event.kind for event in spooled(attempt)] == ["started"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", "test_own_loop:fails' failed with LookupError: no such thing"),
        ("reports_other", "report got 'los', and train.metrics lists reward, loss, top_hits; add it to the job"),
        ("reports_text", "report needs a number for 'loss', got str"),
        ("goes_back", "report needs a step above the last one, 5, got 5; leave it out to count by ones"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_fault_of_the_loop_is_told_once_and_for_good(tmp_path, function, message):
    outcome = run_rank(make_attempt(tmp_path, loop_spec(function)))

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", "UserCodeError", False)
    assert message in outcome.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"kind": "mlp"}}, "a job has no field 'model'"),
        (
            {"target": {"metric": "accuracy", "value": 1.0}},
            "must be one of train.metrics, reward, loss, top_hits, got 'accuracy'",
        ),
        ({"checkpoint": {"every_steps": 5}}, "checkpoint has no field 'every_steps'"),
        ({"target": {"metric": "top_hits", "value": 90}}, "in [0, 1] for top_hits, a share, got 90; divide by 100?"),
    ],
)
def test_job_of_an_own_loop_refuses_options_that_it_would_ignore(changes, message):
    with pytest.raises(SpecProblemsError, match=re.escape(message)):
        loop_spec("halves", **changes)


def ran(rank: int, world_size: int, attempt: AttemptDir) -> dict[str, object]:
    try:
        return run_rank(attempt).model_dump(include={"result", "message", "metrics"})
    except RuntimeError as error:
        return {"result": "broken", "message": str(error)}


@pytest.mark.ranks
def test_ranks_share_the_process_group(tmp_path):
    attempt = make_attempt(tmp_path, loop_spec("sums_ranks", resources={"workers": 2}))

    outcomes = run_ranks(2, ran, attempt)

    assert outcomes[0]["result"] == outcomes[1]["result"] == "succeeded"
    assert records(spooled(attempt))[0].metrics == {"loss": 3.0}


@pytest.mark.ranks
def test_fault_of_one_rank_ends_the_workers_that_start_again(tmp_path):
    attempt = make_attempt(tmp_path, loop_spec("fails_on_rank_1", resources={"workers": 2}))

    outcomes = run_survivors(2, ran, attempt, doomed=set(), timeout_s=60)
    again = run_ranks(2, ran, attempt)

    assert [outcomes[rank]["result"] for rank in (0, 1)] == ["broken", "failed"]
    assert again[0] == again[1] == outcomes[1]
    assert "failed with LookupError: no such thing" in again[0]["message"]


def test_a_run_folder_takes_no_other_loop(tmp_path):
    from ngd_workers.launch.attempt import _check_same_job

    earlier = make_attempt(tmp_path, loop_spec("halves"))
    with pytest.raises(SpecError, match="holds a run that differs in train"):
        _check_same_job(earlier, loop_spec("fails"))

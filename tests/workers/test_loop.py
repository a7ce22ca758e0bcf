import re

import pytest
import torch

from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.checkpoints import Checkpoints
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.optimizers import OPTIMIZERS
from tests.support.parameters import rest_is_slow
from tests.support.training import weights_at

CNN = {"kind": "small_cnn", "channels": 8, "hidden": 32}


def nan_after_evaluation(shape):
    """Returns a model that is sound in evaluation, so that only training finds its NaN."""

    class Diverging(torch.nn.Linear):
        def forward(self, x):
            logits = super().forward(x.flatten(1))
            return logits * float("nan") if self.training else logits

    return Diverging(shape.channels * shape.height * shape.width, shape.classes)


def wrong_width(shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(63, shape.classes))


def wrong_classes(shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))


def reads_rows_of_no_sample(shape):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = torch.nn.Linear(64, shape.classes), torch.nn.Linear(64, shape.classes)

        def forward(self, x):
            return self.layer(x.flatten(1)) + self.other(torch.ones(len(x) + 1, 64)).mean(0)

    return Mixed()


def fails_in_training(shape):
    class Failing(torch.nn.Linear):
        def forward(self, x):
            if self.training:
                raise LookupError("only in training")
            return super().forward(x.flatten(1))

    return Failing(64, shape.classes)


def no_model(shape):
    return "a string"


def raises(shape, reason):
    raise LookupError(reason)


def function(name: str, **options: object) -> dict[str, object]:
    return {"kind": "function", "function": f"tests.workers.test_loop:{name}", "options": options}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_digits_are_learned(tmp_path, kind):
    spec = small_spec(model=CNN, optimizer=OPTIMIZERS[kind], schedule={"epochs": 3}, batch={"global_size": 64})

    outcome = run_rank(make_attempt(tmp_path, spec))

    assert outcome.result == "succeeded"
    assert outcome.metrics["accuracy"] > 0.85  # chance is 0.1


def test_events_tell_the_whole_run(tmp_path):
    attempt = make_attempt(tmp_path, small_spec())

    run_rank(attempt)

    events = spooled(attempt)
    assert events[0].kind == "started"
    assert [record.step for record in records(events)] == list(range(1, 9))
    assert [event.step for event in events if event.kind == "evaluation"] == [4, 8]
    assert [event.step for event in events if event.kind == "checkpoint"] == [2, 4, 6, 8]
    assert {"data", "forward_backward", "update"} <= set(records(events)[0].seconds)


def test_ngd_tells_ages_and_intervals_of_every_statistic(tmp_path):
    attempt = make_attempt(tmp_path, small_spec(optimizer=OPTIMIZERS["ngd"]))

    run_rank(attempt)

    events = spooled(attempt)
    record = records(events)[-1]
    assert len(events[0].statistics) == len(record.ages) == len(record.intervals) > 0


def test_target_that_stops_ends_the_run_there(tmp_path):
    spec = small_spec(
        schedule={"steps": 200, "evaluate_every_steps": 5}, target={"metric": "accuracy", "value": 0.6, "stop": True}
    )
    attempt = make_attempt(tmp_path, spec)

    outcome = run_rank(attempt)

    assert outcome.target_step == outcome.step < 200
    reached = [event for event in spooled(attempt) if event.kind == "target_reached"]
    assert [event.step for event in reached] == [outcome.step]


def test_stop_request_saves_a_checkpoint_and_cancels(tmp_path):
    attempt = make_attempt(tmp_path, small_spec(checkpoint={"every_steps": 100}))
    attempt.stop.touch()

    outcome = run_rank(attempt)

    assert outcome.result == "cancelled"
    assert Checkpoints(tmp_path / "checkpoints", 1, 2).newest_step() == outcome.step < 8


@pytest.mark.parametrize("kind", rest_is_slow(OPTIMIZERS, "ngd", "adamw", "soap"))
def test_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, kind):
    spec = small_spec(model=CNN, optimizer=OPTIMIZERS[kind])
    run_rank(make_attempt(tmp_path / "whole", spec))

    interrupted = make_attempt(tmp_path / "cut", spec)
    run_rank(interrupted)
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "state.pt").write_bytes(b"lost")
    resumed = make_attempt(tmp_path / "cut", spec, number=2)
    run_rank(resumed)

    assert spooled(resumed)[0].resumed_step == 6
    whole, cut = weights_at(tmp_path / "whole", 8), weights_at(tmp_path / "cut", 8)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_finished_run_that_is_run_again_trains_no_step(tmp_path):
    first = run_rank(make_attempt(tmp_path, small_spec()))
    again = make_attempt(tmp_path, small_spec(), number=2)

    second = run_rank(again)

    assert records(spooled(again)) == []
    assert (second.step, second.metrics) == (first.step, first.metrics)


@pytest.mark.parametrize(
    ("spec", "reason", "message"),
    [
        (small_spec(model=function("nan_after_evaluation")), "NonFiniteLoss", "nan at step 1; lower optimizer.lr"),
        (small_spec(model=function("wrong_width")), "UserCodeError", r"\(8, 1, 8, 8\)"),
        (small_spec(model=function("wrong_classes")), "UserCodeError", r"logits of shape \(8, 10\).*got \(8, 7\)"),
        (small_spec(model=function("no_model")), "UserCodeError", "must return a torch.nn.Module, got str"),
        (small_spec(model=function("raises", reason="no luck")), "UserCodeError", "LookupError: no luck"),
        (small_spec(model=function("absent")), "UserCodeError", "has no function 'absent'"),
        (small_spec(model={"kind": "function", "function": "absent:f"}), "UserCodeError", "can't import 'absent'"),
        (
            small_spec(data=function("no_model", shape=1)),
            "UserCodeError",
            "must return a ngd_workers.data.Dataset, or a pair of .*, got str",
        ),
        (small_spec(data={"kind": "idx", "directory": "absent"}), "DataNotFound", "no data directory .*absent"),
        (
            small_spec(batch={"global_size": 5000}),
            "InvalidSpec",
            "at most the number of training samples, 1437, got 5000",
        ),
        (small_spec(data={"kind": "digits", "test_fraction": 0.001}), "InvalidSpec", "test_fraction 0.001"),
        (
            small_spec(target={"metric": "bleu", "value": 1.0}),
            "InvalidSpec",
            "target.metric must be a metric of the job's task, one of accuracy, loss, got 'bleu'",
        ),
        (
            small_spec(target={"metric": "accuracy", "value": 97.0}),
            "InvalidSpec",
            r"target.value must be in \[0, 1\] for accuracy, a share, got 97",
        ),
    ],
)
def test_hopeless_job_fails_with_one_clear_message(tmp_path, spec, reason, message):
    outcome = run_rank(make_attempt(tmp_path, spec))

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", reason, False)
    assert outcome.message is not None
    assert re.search(message, outcome.message), outcome.message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reads_rows_of_no_sample", "which rows belong to one sample can't be told"),
        ("fails_in_training", "failed in training with LookupError: only in training"),
    ],
)
def test_a_model_that_cannot_be_trained_fails_for_good_with_its_reason(tmp_path, name, message):
    spec = small_spec(model=function(name), optimizer=OPTIMIZERS["ngd"])

    outcome = run_rank(make_attempt(tmp_path, spec))

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", "UserCodeError", False)
    assert message in outcome.message

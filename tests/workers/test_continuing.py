"""A job that goes on from another job's checkpoint: as that job would have, or under other settings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ngd_workers.contract.rundir import Outcome
from ngd_workers.contract.spec import JobSpec
from ngd_workers.launch.attempt import run_rank
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.optimizers import DEEP
from tests.support.optimizers import OPTIMIZERS as FOR_DIGITS
from tests.support.parameters import rest_is_slow
from tests.support.training import weights_at

NGD_CHOICE = {"kind": "ngd", "lr": 0.1, "damping": 0.1, "momentum": 0.9}
OPTIMIZERS = FOR_DIGITS | {"ngd": NGD_CHOICE}
SHORT, LONG = {"steps": 6, "evaluate_every_steps": 2}, {"steps": 10, "evaluate_every_steps": 2}


def run(folder: Path, spec: JobSpec) -> Outcome:
    return run_rank(make_attempt(folder, spec))


def from_job(name: str, **changes: Any) -> dict[str, Any]:
    return {"init_from": {"kind": "checkpoint", "run_dir": name, "takes": "everything"} | changes}


@pytest.mark.parametrize("optimizer", rest_is_slow(OPTIMIZERS, "ngd", "adamw"))
def test_more_steps_give_the_bits_of_a_job_that_had_them_from_the_start(tmp_path: Path, optimizer: str) -> None:
    choice = {"optimizer": OPTIMIZERS[optimizer], "model": DEEP}
    run(tmp_path / "whole", small_spec(schedule=LONG, **choice))
    run(tmp_path / "first", small_spec(schedule=SHORT, **choice))

    second = make_attempt(tmp_path / "second", small_spec(schedule=LONG, **choice, **from_job("first")))
    outcome = run_rank(second)

    assert (outcome.result, outcome.step) == ("succeeded", 10), outcome.message
    assert [record.step for record in records(spooled(second))] == [7, 8, 9, 10]
    whole, continued = weights_at(tmp_path / "whole", 10), weights_at(tmp_path / "second", 10)
    assert all(torch.equal(continued[name], whole[name]) for name in whole)


@pytest.mark.parametrize("optimizer", rest_is_slow(OPTIMIZERS, "ngd", "sgd"))
def test_settings_of_the_new_job_count_from_there_on(tmp_path: Path, optimizer: str, caplog) -> None:
    choice = OPTIMIZERS[optimizer]
    run(tmp_path / "first", small_spec(schedule=SHORT, model=DEEP, optimizer=choice))
    changed = choice | {"lr": 0.05, "weight_decay": 0.3}
    long = {"schedule": LONG, "model": DEEP} | from_job("first", step=4)

    with caplog.at_level("INFO"):
        second = make_attempt(tmp_path / "second", small_spec(optimizer=changed, **long))
        outcome = run_rank(second)
    run(tmp_path / "same", small_spec(optimizer=choice, **long))

    assert outcome.result == "succeeded", outcome.message
    assert {record.lr for record in records(spooled(second))} == {0.05}
    assert "goes on from step 4 of first" in caplog.text
    assert f"optimizer.lr {choice['lr']} there, 0.05 here" in caplog.text
    state = torch.load(tmp_path / "second" / "checkpoints" / "step-00000010" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.3
    same, other = weights_at(tmp_path / "same", 10), weights_at(tmp_path / "second", 10)
    assert not all(torch.equal(same[name], other[name]) for name in same)


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"optimizer": OPTIMIZERS["sgd"]}, "InvalidSpec", "the state of optimizer ngd can't go on under optimizer sgd"),
        ({"schedule": SHORT}, "InvalidSpec", "the checkpoint is of step 6, and this job ends at step 6; raise"),
        ({"model": {"kind": "mlp", "hidden": [16]}}, "IncompatibleCheckpoint", "can't go on with the state of step 6"),
        (from_job("nowhere"), "DataNotFound", "no whole checkpoint below"),
        (from_job("first", step=5), "DataNotFound", "no checkpoint of step 5 below"),
    ],
)
def test_state_that_can_not_follow_is_named(tmp_path: Path, changes: dict[str, Any], reason: str, message: str) -> None:
    run(tmp_path / "first", small_spec(schedule=SHORT, optimizer=NGD_CHOICE))
    spec = small_spec(**({"schedule": LONG, "optimizer": NGD_CHOICE} | from_job("first") | changes))

    outcome = run(tmp_path / "second", spec)

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", reason, False)
    assert message in (outcome.message or "")


def test_weights_to_ignore_are_refused_where_everything_is_taken() -> None:
    with pytest.raises(ValueError, match="takes everything needs all"):
        small_spec(**from_job("first", ignore=["head.*"]))

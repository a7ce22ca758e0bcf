"""Checkpoints are written beside the training, by each rank its part."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ngd_workers.contract.checkpoint_files import STATE, WEIGHTS
from ngd_workers.contract.errors import StorageError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import JobSpec
from ngd_workers.launch.attempt import run_rank
from ngd_workers.train.checkpoints import Checkpoints, Snapshot
from ngd_workers.train.loop import Run
from ngd_workers.train.saves import in_host_memory
from tests.support.attempts import make_attempt, small_spec, spooled
from tests.support.ranks import run_ranks
from tests.support.training import weights_at

NGD_CHOICE = {"kind": "ngd", "lr": 0.1, "damping": 0.1, "staleness": {"kind": "fixed", "steps": 1}}
PATIENCE_S = 60.0


def kinds(attempt: AttemptDir, *wanted: str) -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event in spooled(attempt) if event.kind in wanted]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    has_gone_on, met = threading.Event(), []
    write, step_once = Checkpoints.write, Run.step_once

    def slow_write(self: Checkpoints, step: int, rank: int, snapshot: Snapshot) -> None:
        if step == 4:
            met.append(has_gone_on.wait(PATIENCE_S))
        write(self, step, rank, snapshot)

    def told_step(self: Run) -> None:
        step_once(self)
        if self.progress.step == 6:
            has_gone_on.set()

    monkeypatch.setattr(Checkpoints, "write", slow_write)
    monkeypatch.setattr(Run, "step_once", told_step)
    attempt = make_attempt(tmp_path / "slow", small_spec(checkpoint={"every_steps": 4}))
    run_rank(attempt)

    assert met == [True]
    assert kinds(attempt, "checkpoint") == [("checkpoint", 4), ("checkpoint", 8)]
    monkeypatch.undo()
    run_rank(make_attempt(tmp_path / "plain", small_spec(checkpoint={"every_steps": 4})))
    for step in (4, 8):  # the state is that of its step, although it was written later
        slow, plain = weights_at(tmp_path / "slow", step), weights_at(tmp_path / "plain", step)
        assert slow.keys() == plain.keys()
        assert all(torch.equal(slow[name], plain[name]) for name in plain)


def test_copies_in_host_memory_share_nothing_with_the_state():
    state = {"a": torch.ones(2), "b": [torch.zeros(3), (torch.ones(1), 4)], "c": "text"}

    copied = in_host_memory(state)
    state["a"].zero_()
    state["b"][1][0].zero_()

    assert copied["a"].tolist() == [1, 1]
    assert copied["b"][1][0].tolist() == [1]
    assert copied["b"][1][1] == 4
    assert copied["c"] == "text"


def ran(rank: int, world_size: int, attempt: AttemptDir) -> str:
    return run_rank(attempt).result


def ran_with_a_fault(rank: int, world_size: int, attempt: AttemptDir) -> str:
    """The disk of rank 1 is full at the checkpoint of step 2."""
    write = Checkpoints.write

    def failing(self: Checkpoints, step: int, rank: int, snapshot: Snapshot) -> None:
        if (rank, step) == (1, 2):
            snapshot = Snapshot(None, Unwritable(), snapshot.num_ranks)
        write(self, step, rank, snapshot)

    Checkpoints.write = failing  # type: ignore[method-assign]
    return run_rank(attempt).result


class Unwritable:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


@pytest.mark.slow
@pytest.mark.ranks
def test_each_rank_writes_the_layers_that_it_owns_and_any_number_of_ranks_goes_on(tmp_path):
    def spec(workers: int) -> JobSpec:
        return small_spec(
            model={"kind": "mlp", "hidden": [32, 24]},
            optimizer=NGD_CHOICE | {"strategy": {"kind": "owner_sharded", "replicate_below": 0}},
            resources={"workers": workers},
            checkpoint={"every_steps": 4},
        )

    assert run_ranks(2, ran, make_attempt(tmp_path, spec(2))) == ["succeeded"] * 2

    folder = tmp_path / "checkpoints" / "step-00000008"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {WEIGHTS, STATE, "state-rank1.pt"}
    first, second = (torch.load(folder / name, weights_only=True) for name in (STATE, "state-rank1.pt"))
    owned, others = first["optimizer"]["ngd"]["layers"], second["layers"]
    assert owned.keys() & others.keys() == set()
    assert len(owned | others) == 3
    assert others

    whole = weights_at(tmp_path, 8)
    for workers in (1, 4):
        resumed = Path(str(tmp_path) + f"-{workers}")
        (resumed / "checkpoints").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step-00000004").rename(resumed / "checkpoints" / "step-00000004")
        attempt = make_attempt(resumed, spec(workers), number=2)
        assert set(run_ranks(workers, ran, attempt)) == {"succeeded"}
        assert spooled(attempt)[0].resumed_step == 4
        for name, weight in weights_at(resumed, 8, attempt=2).items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4)
        (resumed / "checkpoints" / "step-00000004").rename(tmp_path / "checkpoints" / "step-00000004")


@pytest.mark.ranks
def test_rank_with_a_full_disk_costs_one_checkpoint(tmp_path):
    spec = small_spec(optimizer=NGD_CHOICE, resources={"workers": 2}, checkpoint={"every_steps": 2})
    attempt = make_attempt(tmp_path, spec)

    assert run_ranks(2, ran_with_a_fault, attempt) == ["succeeded"] * 2

    assert kinds(attempt, "checkpoint", "checkpoint_failed") == [
        ("checkpoint_failed", 2),
        ("checkpoint", 4),
        ("checkpoint", 6),
        ("checkpoint", 8),
    ]
    (failed,) = [event for event in spooled(attempt) if event.kind == "checkpoint_failed"]
    assert "No space left on device" in failed.message


def test_result_that_can_not_be_written_fails_the_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr("ngd_workers.train.saves.LAST_CHECKPOINT_S", 0.2)

    def full(self: Checkpoints, step: int, rank: int, snapshot: Snapshot) -> None:
        raise StorageError("can't write the checkpoint: No space left on device")

    monkeypatch.setattr(Checkpoints, "write", full)
    outcome = run_rank(make_attempt(tmp_path, small_spec()))

    assert (outcome.result, outcome.reason) == ("failed", "StorageUnavailable")
    assert "No space left on device" in (outcome.message or "")

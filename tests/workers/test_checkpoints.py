import hashlib
import json
import threading

import pytest
import torch

from ngd_workers.contract.checkpoint_files import PINNED, STATE, WEIGHTS, Score
from ngd_workers.contract.errors import StorageError, SupersededError
from ngd_workers.contract.rundir import AttemptDir, write_json
from ngd_workers.train.checkpoints import Checkpoints, Snapshot
from tests.support.faulty_files import ERRORS, Faults

CPU = torch.device("cpu")


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", attempt=2, keep=2)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, Snapshot({"weight": torch.full((3,), float(step))}, {"step": step}))


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_newest_is_loaded_as_it_was_saved(checkpoints):
    save(checkpoints, 1, 2)

    assert checkpoints.newest_step() == 2
    weights, states = checkpoints.load(2, CPU)
    assert weights is not None
    assert weights["weight"].tolist() == [2, 2, 2]
    assert states == [{"step": 2}]


def test_none_means_step_zero(checkpoints):
    assert checkpoints.newest_step() == 0


def test_only_the_newest_are_kept(checkpoints):
    save(checkpoints, 1, 2, 10)

    assert names(checkpoints) == ["step-00000002", "step-00000010"]


def test_pinned_ones_are_kept_too_even_if_that_was_asked_for_during_the_removal(checkpoints):
    save(checkpoints, 1, 2)
    (checkpoints.path(1) / PINNED).touch()
    save(checkpoints, 3, 4)
    assert names(checkpoints) == ["step-00000001", "step-00000003", "step-00000004"]

    checkpoints.path(3).rename(checkpoints.unfinished(3))  # an attempt that died within it
    (checkpoints.unfinished(3) / PINNED).touch()
    save(checkpoints, 5, 6)

    assert names(checkpoints) == [f"step-0000000{step}" for step in (1, 3, 5, 6)]


@pytest.mark.parametrize("file", [STATE, WEIGHTS, "manifest.json"])
def test_damaged_checkpoint_is_skipped_with_a_word_in_the_log(checkpoints, caplog, file):
    save(checkpoints, 1, 2)
    damaged = checkpoints.path(2) / file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    assert checkpoints.newest_step() == 1
    assert "step-00000002 is skipped" in caplog.text


@pytest.mark.parametrize("file", [STATE, WEIGHTS, "manifest.json"])
def test_checkpoint_without_one_of_its_files_is_skipped(checkpoints, file):
    save(checkpoints, 1, 2)
    (checkpoints.path(2) / file).unlink()

    assert checkpoints.newest_step() == 1


def test_a_damaged_one_does_not_take_the_place_of_the_one_just_written(tmp_path):
    only_one = Checkpoints(tmp_path / "checkpoints", attempt=2, keep=1)
    save(only_one, 100)
    (only_one.path(100) / "state.pt").write_bytes(b"?")

    save(only_one, 50)

    assert only_one.newest_step() == 50


def test_half_written_checkpoint_is_skipped_and_cleared_by_the_next(checkpoints):
    save(checkpoints, 1)
    torn = checkpoints.folder / "step-00000002.tmp-a1"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")

    assert checkpoints.newest_step() == 1
    save(checkpoints, 3)
    assert names(checkpoints) == ["step-00000001", "step-00000003"]


def test_damaged_checkpoint_is_replaced_when_its_step_comes_again(checkpoints):
    save(checkpoints, 1, 2)
    (checkpoints.path(2) / "state.pt").write_bytes(b"damaged")

    save(checkpoints, 2)

    assert checkpoints.newest_step() == 2


def test_earlier_attempt_may_not_write_after_a_later_one(checkpoints):
    save(checkpoints, 4)
    stale = Checkpoints(checkpoints.folder, attempt=1, keep=2)

    with pytest.raises(SupersededError, match=r"attempt 1 .* attempt 2"):
        save(stale, 6)
    assert names(checkpoints) == ["step-00000004"]


def test_unfinished_write_of_a_later_attempt_is_left_alone(checkpoints):
    (checkpoints.folder / "step-00000009.tmp-a3").mkdir(parents=True)

    save(checkpoints, 1)

    assert "step-00000009.tmp-a3" in names(checkpoints)


def test_attempt_that_the_service_has_ended_commits_nothing(checkpoints):
    save(checkpoints, 1)
    ended = AttemptDir.of(checkpoints.folder.parent, checkpoints.attempt).ended
    ended.parent.mkdir(parents=True)
    ended.touch()

    with pytest.raises(SupersededError, match="attempt 2 may not write: the service has ended it"):
        save(checkpoints, 2)

    assert names(checkpoints) == ["step-00000001"]


def test_attempt_that_is_ended_while_it_writes_commits_nothing(checkpoints, monkeypatch):
    ended = AttemptDir.of(checkpoints.folder.parent, checkpoints.attempt).ended
    ended.parent.mkdir(parents=True)

    def write_and_end(path, value):
        write_json(path, value)
        if path.name == "manifest.json":
            ended.touch()

    monkeypatch.setattr("ngd_workers.train.checkpoints.write_json", write_and_end)

    with pytest.raises(SupersededError):
        save(checkpoints, 1)

    assert names(checkpoints) == []


@pytest.mark.parametrize("error", ["full", "broken"])
@pytest.mark.parametrize("operation", ["open", "os.open", "fsync", "mkdir", "listdir", "rename", "replace"])
def test_failed_save_says_so_and_leaves_the_older_ones(checkpoints, monkeypatch, operation, error):
    save(checkpoints, 1)
    faults = Faults(checkpoints.folder, monkeypatch)
    faults.fail(operation, ERRORS[error], 1)

    with pytest.raises(StorageError, match="can't write the checkpoint of step 2"):
        save(checkpoints, 2)

    assert checkpoints.newest_step() == 1 or operation == "os.open"  # of the folder, after the rename
    assert not [name for name in names(checkpoints) if ".tmp-" in name]
    save(checkpoints, 3)
    assert checkpoints.newest_step() == 3


@pytest.mark.parametrize("operation", ["open", "listdir"])
def test_checkpoint_that_can_not_be_read_now_is_not_passed_over(checkpoints, monkeypatch, operation):
    save(checkpoints, 1, 2)
    faults = Faults(checkpoints.folder, monkeypatch)
    faults.fail(operation, ERRORS["broken"], 1)

    with pytest.raises(StorageError, match="can't read the checkpoints"):
        checkpoints.newest_step()

    assert checkpoints.newest_step() == 2


def test_disk_that_is_full_in_the_middle_of_the_state_is_a_storage_error(checkpoints, monkeypatch):
    folder = checkpoints.folder / "step-00000001.tmp-a2"
    monkeypatch.setattr("ngd_workers.train.checkpoints.shutil.rmtree", lambda *_, **__: None)
    folder.mkdir(parents=True)
    (folder / STATE).symlink_to("/dev/full")
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: None)

    with pytest.raises(StorageError, match="No space left on device"):
        save(checkpoints, 1)


def test_weights_that_can_not_be_written_are_a_storage_error(checkpoints):
    checkpoints.begin(1)
    (checkpoints.unfinished(1) / WEIGHTS).mkdir()

    with pytest.raises(StorageError, match=f"can't write the checkpoint of step 1 .*{WEIGHTS}"):
        checkpoints.write(1, 0, Snapshot({"weight": torch.zeros(3)}, {}))


@pytest.mark.parametrize(("better", "best"), [("higher", 2), ("lower", 1)])
def test_the_best_is_kept_beside_the_newest(checkpoints, better, best):
    for step, value in enumerate([0.5, 0.9, 0.7, 0.8, 0.6], start=1):
        score = Score(metrics={"m": value, "loss": float("inf")}, better=better)
        checkpoints.save(step, Snapshot({"weight": torch.zeros(3)}, {}, score=score))

    assert names(checkpoints) == [f"step-{step:08d}" for step in (best, 4, 5)]
    assert checkpoints.newest_step() == 5


def written_by(checkpoints: Checkpoints, step: int, ranks: list[int], num_ranks: int) -> None:
    for rank in ranks:
        weights = {"weight": torch.zeros(3)} if rank == 0 else None
        checkpoints.write(step, rank, Snapshot(weights, {"rank": rank}, num_ranks))


def test_checkpoint_of_several_ranks_is_complete_when_the_last_of_them_has_written(checkpoints):
    checkpoints.begin(5)
    written_by(checkpoints, 5, [0], 3)
    committed = threading.Thread(
        target=checkpoints.commit,
        args=(5, Snapshot({"weight": torch.zeros(3)}, None, 3)),
        kwargs={"world_size": 3, "gives_up": lambda: False},
    )
    committed.start()
    written_by(checkpoints, 5, [2], 3)
    assert checkpoints.newest_step() == 0

    written_by(checkpoints, 5, [1], 3)
    committed.join()

    assert checkpoints.newest_step() == 5
    assert checkpoints.load(5, CPU)[1] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert sorted(path.name for path in checkpoints.path(5).iterdir()) == [
        "manifest.json",
        "state-rank1.pt",
        "state-rank2.pt",
        STATE,
        WEIGHTS,
    ]


def test_rank_that_can_not_write_its_part_is_named_and_nothing_is_committed(checkpoints, monkeypatch):
    save(checkpoints, 1)
    checkpoints.begin(5)
    written_by(checkpoints, 5, [0], 2)
    faults = Faults(checkpoints.folder, monkeypatch)
    faults.fail("open", ERRORS["full"], 1)
    with pytest.raises(StorageError, match="No space left"):
        written_by(checkpoints, 5, [1], 2)

    with pytest.raises(StorageError, match=r"can't write the checkpoint of step 5 .*No space left"):
        checkpoints.commit(5, Snapshot({}, None, 2), world_size=2, gives_up=lambda: False)

    assert checkpoints.newest_step() == 1


def test_rank_that_never_writes_is_given_up(checkpoints):
    checkpoints.begin(5)
    written_by(checkpoints, 5, [0], 2)

    with pytest.raises(StorageError, match="rank 1 has not written its part"):
        checkpoints.commit(5, Snapshot({"weight": torch.zeros(3)}, None, 2), world_size=2, gives_up=lambda: True)


def test_checkpoint_of_the_version_before_is_read(checkpoints):
    save(checkpoints, 3)
    folder = checkpoints.path(3)
    torch.save({"model": {"weight": torch.ones(3)}, "optimizer": {}, "progress": {"step": 3}}, folder / STATE)
    (folder / WEIGHTS).unlink()
    content = (folder / STATE).read_bytes()
    old = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"step": 3, "attempt": 1, "world_size": 2} | old))

    assert checkpoints.newest_step() == 3
    weights, (state,) = checkpoints.load(3, CPU)
    assert weights is None
    assert state["model"]["weight"].tolist() == [1, 1, 1]

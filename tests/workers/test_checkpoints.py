import pytest
import torch

from ngd_workers.contract.errors import StorageError, SupersededError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.train.checkpoints import Checkpoints
from tests.support.faulty_files import ERRORS, Faults

CPU = torch.device("cpu")


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", attempt=2, keep=2)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"weight": torch.full((3,), float(step))}, world_size=1)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_newest_is_loaded_as_it_was_saved(checkpoints):
    save(checkpoints, 1, 2)

    assert checkpoints.newest_step() == 2
    assert checkpoints.load(2, CPU)["weight"].tolist() == [2, 2, 2]


def test_none_means_step_zero(checkpoints):
    assert checkpoints.newest_step() == 0


def test_only_the_newest_are_kept(checkpoints):
    save(checkpoints, 1, 2, 10)

    assert names(checkpoints) == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_damaged_checkpoint_is_skipped_with_a_word_in_the_log(checkpoints, caplog, file):
    save(checkpoints, 1, 2)
    damaged = checkpoints.path(2) / file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    assert checkpoints.newest_step() == 1
    assert "step-00000002 is skipped" in caplog.text


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
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
    monkeypatch.setattr("ngd_workers.train.checkpoints.write_json", lambda path, manifest: ended.touch())

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
    (folder / "state.pt").symlink_to("/dev/full")
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: None)

    with pytest.raises(StorageError, match="No space left on device"):
        save(checkpoints, 1)

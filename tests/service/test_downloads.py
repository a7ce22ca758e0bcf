"""Checkpoints of a job over REST and by `ngd`: listed, got, got on with, and checked."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from ngd_service.client.client import NotFoundError
from ngd_service.client.downloads import CARD
from ngd_workers.contract.checkpoint_files import STATE, WEIGHTS, Score, folder_of
from ngd_workers.train.checkpoints import Checkpoints, Snapshot
from tests.service.test_cli import ngd, spec_file
from tests.support.service_process import ServiceProcess

SIZE = 200_000
VALUES = {10: 0.5, 20: 0.9, 30: 0.7, 40: 0.6}


@pytest.fixture
def job(tmp_path: Path, shared_service: ServiceProcess) -> str:
    """A job that has ended, with checkpoints of steps 20 (the best), 30 and 40."""
    submitted = ngd("submit", spec_file(tmp_path, "steps"), "--follow", url=shared_service.url)
    job_id = submitted.stdout.split()[0]
    checkpoints = Checkpoints(shared_service.home / "runs" / job_id / "checkpoints", attempt=2, keep=2)
    for step, value in VALUES.items():
        score = Score(metrics={"accuracy": value, "loss": 1 - value}, better="higher")
        checkpoints.save(step, Snapshot({"w": torch.full((SIZE,), float(step))}, {"progress": step}, score=score))
    return job_id


@pytest.fixture
def get(tmp_path: Path, job: str, shared_service: ServiceProcess) -> Callable[..., str]:
    """Runs `ngd download` into <tmp_path>/out; returns what it says on stderr, where it fails, or prints."""

    def run(*arguments: str) -> str:
        result = ngd("download", job, "--output", str(tmp_path / "out"), *arguments, url=shared_service.url)
        return result.stdout if result.returncode == 0 else result.stderr

    return run


def weights(folder: Path) -> float:
    loaded = load_file(folder / WEIGHTS)["w"]
    assert loaded.shape == (SIZE,)
    return float(loaded[0])


def test_checkpoints_are_listed_newest_first_with_the_best_one(job: str, shared_service: ServiceProcess) -> None:
    kept = shared_service.client.checkpoints(job)

    assert [(one.step, one.is_best) for one in kept] == [(40, False), (30, False), (20, True)]
    assert kept[2].metrics == pytest.approx({"accuracy": 0.9, "loss": 0.1})
    assert kept[0].files.keys() == {WEIGHTS, STATE}
    shown = ngd("checkpoints", job, url=shared_service.url).stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["step", "40", "30", "20"]
    assert "accuracy 0.9" in shown[3]
    assert shown[3].rstrip().endswith("best")


def test_pinned_checkpoint_stays_until_it_is_unpinned(job: str, shared_service: ServiceProcess) -> None:
    folder = shared_service.home / "runs" / job / "checkpoints"
    checkpoints = Checkpoints(folder, attempt=2, keep=1)
    snapshot = Snapshot({"w": torch.zeros(3)}, {})

    shown = ngd("checkpoints", job, "--pin", "30", url=shared_service.url).stdout.splitlines()
    assert [line.split()[0] for line in shown if line.rstrip().endswith("pinned")] == ["30"]
    checkpoints.save(50, snapshot)
    assert [(one.step, one.is_pinned) for one in shared_service.client.checkpoints(job)] == [
        (50, False), (30, True), (20, False)
    ]  # fmt: skip
    assert not shared_service.client.unpin(job, 30).is_pinned
    checkpoints.save(60, snapshot)
    assert [one.step for one in shared_service.client.checkpoints(job)] == [60, 20]
    with pytest.raises(NotFoundError, match="keeps no checkpoint of step 30; it keeps those of: 60, 20"):
        shared_service.client.pin(job, 30)


@pytest.mark.parametrize(("arguments", "step"), [((), 40), (("--step", "30"), 30), (("--best",), 20)])
def test_weights_and_their_card_are_got(
    tmp_path: Path, get: Callable[..., str], arguments: tuple[str, ...], step: int
) -> None:
    said = get(*arguments)

    out = tmp_path / "out"
    assert weights(out) == step
    assert sorted(path.name for path in out.iterdir()) == [CARD, WEIGHTS]
    card = json.loads((out / CARD).read_text())
    assert (card["step"], card["name"]) == (step, "steps")
    assert card["metrics"]["accuracy"] == VALUES[step]
    assert card["spec"]["optimizer"]["kind"] == "sgd"
    assert str(out / WEIGHTS) in said


def test_all_that_training_goes_on_from_is_got_on_demand(tmp_path: Path, get: Callable[..., str]) -> None:
    get("--all")

    assert torch.load(tmp_path / "out" / STATE, weights_only=True) == {"progress": 40}


def test_transfer_that_broke_off_goes_on_where_it_did(
    tmp_path: Path, job: str, get: Callable[..., str], shared_service: ServiceProcess
) -> None:
    get()
    whole = (tmp_path / "out" / WEIGHTS).read_bytes()
    (tmp_path / "out" / WEIGHTS).unlink()
    sha256 = shared_service.client.checkpoints(job)[0].files[WEIGHTS].sha256
    part = tmp_path / "out" / f".{WEIGHTS}.{sha256[:12]}.part"
    part.write_bytes(whole[:100_000])

    rest = list(shared_service.client.download_file(job, 40, WEIGHTS, start=100_000))
    get()

    assert b"".join(rest) == whole[100_000:]
    assert weights(tmp_path / "out") == 40
    assert not part.exists()


def test_part_that_is_not_of_this_file_is_found_and_taken_away(
    tmp_path: Path, job: str, get: Callable[..., str], shared_service: ServiceProcess
) -> None:
    sha256 = shared_service.client.checkpoints(job)[0].files[WEIGHTS].sha256
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{WEIGHTS}.{sha256[:12]}.part").write_bytes(b"x" * 1000)

    assert f"{WEIGHTS} of step 40 is damaged" in get()
    get()
    assert weights(tmp_path / "out") == 40


def test_file_that_is_damaged_on_the_service_is_not_taken_for_the_weights(
    tmp_path: Path, job: str, get: Callable[..., str], shared_service: ServiceProcess
) -> None:
    path = folder_of(shared_service.home / "runs" / job / "checkpoints", 40) / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    assert "is damaged: it must be" in get()
    assert not (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "7"), "keeps no checkpoint of step 7; it keeps those of: 40, 30, 20"),
        (("--step", "30", "--best"), "--step and --best name two checkpoints; give one"),
    ],
)
def test_checkpoint_that_is_not_there_is_told_with_those_that_are(
    get: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in " ".join(get(*arguments).replace("│", " ").split())


def test_job_without_a_checkpoint_says_so(tmp_path: Path, shared_service: ServiceProcess) -> None:
    job_id = ngd("submit", spec_file(tmp_path, "steps"), "--follow", url=shared_service.url).stdout.split()[0]

    assert "has saved no checkpoint" in ngd("checkpoints", job_id, url=shared_service.url).stdout
    result = ngd("download", job_id, url=shared_service.url)
    assert result.returncode == 1
    assert f"{job_id} has saved no checkpoint; it is SUCCEEDED" in result.stderr


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("40/files/manifest.json", 404),
        ("40/files/..%2Fmanifest.json", 404),
        ("41/files/weights.safetensors", 404),
        ("x/files/weights.safetensors", 422),
    ],
)
def test_no_other_file_is_given_away(job: str, shared_service: ServiceProcess, path: str, status: int) -> None:
    answer = httpx.get(f"{shared_service.url}/api/v1/jobs/{job}/checkpoints/{path}")

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"

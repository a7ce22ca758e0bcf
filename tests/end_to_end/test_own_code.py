"""A user ships a folder of code, and trains it, by a service that knows nothing of the folder."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ngd_service.client.client import Client
from tests.service.test_crash import drivers
from tests.support.deadline import wait_until
from tests.support.own_code import STRANGER, users_folder, write
from tests.support.service_process import NGD, ServiceProcess

SECRET = "c0rrect-horse"
TRAINING_S = 200


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts a service in a folder of a stranger's, whose names are those of packages."""
    started: list[ServiceProcess] = []

    def start(**settings: object) -> ServiceProcess:
        secrets_dir = write(tmp_path / "secrets", {"hub": SECRET})
        elsewhere = users_folder(tmp_path / "services")
        (elsewhere / "typing.py").unlink()  # `python -m` of the service itself would import it
        started.append(
            ServiceProcess(
                tmp_path / "home", folder=elsewhere, driver_command=None, secrets_dir=str(secrets_dir), **settings
            )
        )
        return started[-1]

    yield start
    for service in started:
        service.close()


def submitted(service: ServiceProcess, job: Path, *, folder: Path) -> tuple[str, str]:
    """Returns the job's id and what the command says beside it."""
    folder.mkdir(exist_ok=True)
    command = [*NGD, "submit", str(job), "--url", service.url]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=os.environ)
    return ended.stdout.split()[0], ended.stderr


def answers(client: Client, job_id: str) -> str:
    """Returns all that the service tells of a job."""
    events = "".join(event.model_dump_json() for event in client.events(job_id, limit=1000).events)
    return client.get(job_id).model_dump_json() + events + client.logs(job_id)


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])], ids=["here", "on Ray"]
)
def test_folder_trains_from_elsewhere_and_no_secret_is_told(
    start: Callable[..., ServiceProcess], tmp_path: Path, workers: int
) -> None:
    service = start()
    job = users_folder(tmp_path / "theirs") / "job.yaml"
    job.write_text(job.read_text() + f"secrets: {{TOKEN: hub}}\nresources: {{workers: {workers}}}\n")

    first, told = submitted(service, job, folder=tmp_path / "client")
    ended = service.client.wait(first, timeout_s=TRAINING_S)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1), ended.status.message
    assert told.startswith("code shipped: 9 files, ")
    assert f"and {len(SECRET)} characters" in service.client.logs(first)
    assert SECRET not in answers(service.client, first)
    leaks = [path for path in service.home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert leaks == []
    assert submitted(service, job, folder=tmp_path / "client")[1].startswith("code unchanged: 9 files, ")


@pytest.mark.slow
def test_later_attempt_goes_on_with_the_same_code(start: Callable[..., ServiceProcess], tmp_path: Path) -> None:
    service = start()
    folder = users_folder(tmp_path / "theirs")
    job = folder / "job.yaml"
    job.write_text(job.read_text().replace("steps: 6", "steps: 100000") + "secrets: {TOKEN: hub}\n")
    job_id, _ = submitted(service, job, folder=tmp_path / "client")
    run_dir = service.home / "runs" / job_id

    wait_until(lambda: list(run_dir.glob("checkpoints/step-*/*")), "a checkpoint", timeout_s=60)
    (folder / "mine.py").write_text("raise AssertionError('a later change is no part of the job')\n")
    (driver,) = drivers(service, job_id)
    driver.kill()
    second = run_dir / "attempts" / "2" / "events.jsonl"
    wait_until(lambda: second.exists() and b"steps" in second.read_bytes(), "it goes on", timeout_s=TRAINING_S)
    service.client.cancel(job_id)

    assert service.client.wait(job_id, timeout_s=TRAINING_S).status.phase == "CANCELLED"


def ngd(service: ServiceProcess, *arguments: str, folder: Path) -> str:
    """Returns what a command says that succeeds in this folder."""
    command = [*NGD, *arguments, "--url", service.url]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_weights_come_out_and_training_goes_on_from_there(start: Callable[..., ServiceProcess], tmp_path: Path) -> None:
    service, client = start(), tmp_path / "client"
    job = users_folder(tmp_path / "theirs") / "job.yaml"
    job.write_text(job.read_text() + "secrets: {TOKEN: hub}\n")
    first, _ = submitted(service, job, folder=client)
    service.client.wait(first, timeout_s=TRAINING_S)

    twin = ngd(service, "submit", str(job), "--set", "optimizer={kind: sgd}", folder=client).split()[0]
    more = ngd(service, "submit", "--from", first, "--set", "schedule.steps=9", folder=client).split()[0]
    for job_id, steps in ((twin, 6), (more, 9)):
        ended = service.client.wait(job_id, timeout_s=TRAINING_S)
        assert (ended.status.phase, ended.status.progress.step) == ("SUCCEEDED", steps), ended.status.message
    compared = ngd(service, "compare", first, twin, more, folder=client)
    rows = {line.split()[0]: line.split()[1:] for line in compared.splitlines() if line.strip()}
    assert rows["schedule.steps"] == ["6", "6", "9"]
    assert rows["optimizer.kind"] == ["ngd", "sgd", "ngd"]

    ngd(service, "export", more, "--format", "torchscript", "-o", "out", folder=client)

    outputs = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER], cwd=client / "out", capture_output=True, text=True, check=True
    )
    assert outputs.stdout == "True\n"

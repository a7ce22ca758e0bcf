"""Code on its way to the service: stored once under its sum, named by jobs, and refused with a sentence."""

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from ngd_service.api import problems
from ngd_service.client.client import AsyncClient, Client, InvalidRequestError
from ngd_service.dispatchers.base import AttemptRef, DispatchError, Launch
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.dispatchers.kuberay import KubeRayDispatcher
from ngd_workers.contract.rundir import AttemptDir
from tests.support.attempts import small_spec
from tests.support.own_code import write
from tests.support.service_process import ServiceProcess

CONTENT = b"an archive"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = f"/api/v1/code/{SHA256}"


@pytest.fixture
def http(app: FastAPI) -> TestClient:
    """Requests to the app whose controller is at rest; its runs are below tmp_path."""
    return TestClient(app, base_url="http://127.0.0.1:8000")


def stored(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "runs" / ".code").glob("*"))


def with_code(**code: Any) -> dict[str, Any]:
    return small_spec(code=code).model_dump(mode="json")


def test_archive_is_stored_under_its_sum(http: TestClient, tmp_path: Path) -> None:
    assert http.head(PATH).status_code == 404

    first, second = http.put(PATH, content=CONTENT), http.put(PATH, content=iter([b"an ", b"archive"]))

    assert (first.status_code, second.status_code, http.head(PATH).status_code) == (204, 204, 204)
    assert stored(tmp_path) == [f"{SHA256}.tar.gz"]
    assert (tmp_path / "runs" / ".code" / f"{SHA256}.tar.gz").read_bytes() == CONTENT


def test_archive_that_comes_in_part_is_not_kept(http: TestClient, tmp_path: Path) -> None:
    refused = http.put(PATH, content=CONTENT[:-1])

    assert (refused.status_code, refused.json()["code"]) == (422, "archive_differs")
    assert f"the address names {SHA256}" in refused.json()["detail"]
    assert stored(tmp_path) == []


def test_address_that_is_no_sum_is_refused(http: TestClient) -> None:
    assert http.put("/api/v1/code/ABC", content=CONTENT).status_code == 422


def test_archive_above_the_bound_is_refused_as_it_comes(
    http: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems, "MAX_ARCHIVE_BYTES", 2048)

    refused = http.put(PATH, content=bytes(2049))

    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
    assert refused.json()["detail"] == f"the body is larger than the 2 KiB that {PATH} takes"
    assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (errno.ENOSPC, 507, "disk is full, so the code was not stored"),
        (errno.ESTALE, 503, "folder of code (Stale file"),
    ],
)
def test_disk_that_refuses_is_said(
    http: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int, words: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ngd_service.dispatchers.archives.os.fsync", fail)

    refused = http.put(PATH, content=CONTENT)

    assert refused.status_code == status
    assert words in refused.json()["detail"]
    assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ({}, "code.sha256 is missing: the folder was not shipped"),
        ({"sha256": SHA256}, f"code.sha256 must name an archive that was shipped, got {SHA256}"),
    ],
)
def test_job_names_code_that_is_there(http: TestClient, code: dict[str, Any], words: str) -> None:
    refused = http.post("/api/v1/jobs", json=with_code(**code))

    (item,) = refused.json()["errors"]
    assert (refused.status_code, item["pointer"], item["detail"]) == (422, "/code/sha256", words)
    assert "ngd submit ships the folder" in item["hint"]
    assert http.post("/api/v1/jobs?validate_only=true", json=with_code(**code)).status_code == 200
    assert http.get("/api/v1/jobs").json()["jobs"] == []

    http.put(PATH, content=CONTENT)
    assert http.post("/api/v1/jobs", json=with_code(sha256=SHA256)).status_code == 201


def test_secrets_need_a_folder_of_them(http: TestClient) -> None:
    refused = http.post("/api/v1/jobs", json=small_spec(secrets={"TOKEN": "hub"}).model_dump(mode="json"))

    (item,) = refused.json()["errors"]
    assert (refused.status_code, item["pointer"]) == (422, "/secrets")
    assert item["detail"] == "secrets must be left out: this service has none, got hub"
    assert "NGD_SECRETS_DIR" in item["hint"]


def test_image_needs_a_dispatcher_that_takes_one(http: TestClient, tmp_path: Path) -> None:
    spec = small_spec(image="mine:2").model_dump(mode="json")

    refused = http.post("/api/v1/jobs", json=spec)

    (item,) = refused.json()["errors"]
    words = "image must be left out: the workers of this service run where they are installed, got mine:2"
    assert (refused.status_code, item["pointer"], item["detail"]) == (422, "/image", words)
    assert "NGD_DISPATCHER=kuberay" in item["hint"]
    launch = Launch(AttemptRef("job_x", 1), spec, "token")
    runs = tmp_path / "runs"
    with pytest.raises(DispatchError, match=words):
        AttemptFiles(runs_dir=runs, data_dir=None, worker_url="", cluster="own").prepare(launch)
    takes = KubeRayDispatcher.takes_images
    AttemptFiles(runs_dir=runs, data_dir=None, worker_url="", cluster="given", takes_images=takes).prepare(launch)


def test_listed_modules_leave_no_room_for_code(start_service: Callable[..., ServiceProcess], tmp_path: Path) -> None:
    service = start_service(function_modules="mine")
    files = AttemptFiles(
        runs_dir=tmp_path / "runs", data_dir=None, worker_url="", cluster="own", function_modules=("mine",)
    )

    for changes, names in [
        ({"code": {}}, "code"),
        ({"image": "mine:2"}, "image"),
        ({"code": {}, "env": {"A": "1"}}, "code and env"),
    ]:
        spec = small_spec(**changes).model_dump(mode="json")
        words = rf"{names} must be left out: this service runs functions of the modules mine alone"
        with pytest.raises(InvalidRequestError, match=words):
            service.client.ship(spec, tmp_path)
        with pytest.raises(DispatchError, match=words):
            files.prepare(Launch(AttemptRef("job_x", 1), spec, "token"))


def test_attempts_are_told_where_code_and_secrets_are(tmp_path: Path) -> None:
    runs, secrets = tmp_path / "runs", tmp_path / "secrets"
    files = AttemptFiles(runs_dir=runs, data_dir=None, worker_url="", cluster="own", secrets_dir=secrets)
    spec = small_spec(code={"sha256": SHA256}).model_dump(mode="json")

    first, second = (files.prepare(Launch(AttemptRef("job_x", number), spec, "token")) for number in (1, 2))

    facts = [AttemptDir(folder.path).read_facts() for folder in (first, second)]
    assert {(fact.code, fact.secrets_dir) for fact in facts} == {(runs / ".code" / f"{SHA256}.tar.gz", secrets)}


def test_client_ships_a_folder_once(client: Client, shared_service: ServiceProcess, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {"model.py": "", "deep/data.py": ""})
    spec = small_spec(name="steps", code={"directory": "mine"}).model_dump(mode="json")

    first, second = client.ship(spec, tmp_path), client.ship(spec, tmp_path)

    assert first.archive is not None
    assert first.archive == second.archive
    assert (str(first), second.was_there) == (f"code shipped: 2 files, {len(first.archive.content)} B", True)
    assert str(second).startswith("code unchanged: 2 files, ")
    job = client.submit(second.spec)
    assert client.get(job.id).spec["code"]["sha256"] == first.archive.sha256
    again = client.ship(job.spec, tmp_path / "elsewhere")  # an earlier job's: nothing to ship
    assert again.archive is None
    assert client.submit(again.spec).id != job.id
    (folder / "model.py").write_text("changed\n")
    assert client.ship(spec, tmp_path).was_there is False


def test_asynchronous_client_ships_as_the_other_one(shared_service: ServiceProcess, tmp_path: Path) -> None:
    write(tmp_path, {"model.py": "of the asynchronous one\n"})

    async def shipped() -> list[bool]:
        async with AsyncClient(shared_service.url) as client:
            spec = with_code()
            return [(await client.ship(spec, tmp_path)).was_there for _ in range(2)]

    assert asyncio.run(shipped()) == [False, True]


def test_client_ships_nothing_for_a_job_without_code(client: Client, tmp_path: Path) -> None:
    spec = small_spec().model_dump(mode="json")

    assert client.ship(spec, tmp_path / "none").spec == spec

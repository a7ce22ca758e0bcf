"""The `ngd` command against a real service: what it prints, and its exit status."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.attempts import small_spec
from tests.support.service_process import NGD, ServiceProcess


def ngd(
    *arguments: str, url: str | None = None, timeout_s: float = 60, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from ngd_service.cli.commands import main; main()",
        *arguments,
        *(["--url", url] if url else []),
    ]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)


@pytest.fixture
def url(shared_service: ServiceProcess) -> str:
    return shared_service.url


def spec_file(folder: Path, name: str, **changes: object) -> str:
    path = folder / f"{name}.json"
    path.write_text(small_spec(name=name, schedule={"steps": 20}, **changes).model_dump_json())
    return str(path)


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("steps", 0, "steps SUCCEEDED at step 20, test accuracy 90.00%, loss 0.1"),
        ("refuses", 1, "refuses FAILED - DataNotFound: no folder '[/x]'; set NGD_DATA_DIR"),
    ],
)
def test_submit_and_follow_ends_as_the_job_does(tmp_path: Path, url: str, name: str, status: int, words: str) -> None:
    result = ngd("submit", spec_file(tmp_path, name), "--follow", url=url)

    assert result.returncode == status, result.stderr
    assert words in result.stdout


def test_following_a_job_that_is_cancelled_ends_with_3(tmp_path: Path, shared_service: ServiceProcess) -> None:
    command = [
        sys.executable,
        "-c",
        "from ngd_service.cli.commands import main; main()",
        "submit",
        spec_file(tmp_path, "waits"),
    ]
    with subprocess.Popen(
        [*command, "--follow", "--url", shared_service.url], stdout=subprocess.PIPE, text=True
    ) as shown:
        assert shown.stdout is not None
        job_id = shown.stdout.readline().split()[0]
        shared_service.client.cancel(job_id)
        shown.stdout.read()

    assert shown.returncode == 3


def test_job_is_listed_shown_and_its_log_printed(tmp_path: Path, url: str) -> None:
    job_id = ngd("submit", spec_file(tmp_path, "steps"), url=url).stdout.split()[0]
    followed = ngd("logs", job_id, "--follow", url=url)

    assert "attempt 1 of steps" in followed.stdout
    assert job_id in ngd("jobs", url=url).stdout
    assert json.loads(ngd("get", job_id, url=url).stdout)["id"] == job_id
    assert ngd("logs", job_id, "--tail", "1", url=url).stdout == followed.stdout.splitlines(keepends=True)[-1]
    assert "SUCCEEDED" in ngd("cancel", job_id, url=url).stdout


def test_followed_job_is_told_line_by_line_where_there_is_no_terminal(tmp_path: Path, url: str) -> None:
    path = tmp_path / "long.json"
    path.write_text(small_spec(name="steps", schedule={"steps": 12345}).model_dump_json())
    command = [*NGD, "submit", str(path), "--follow", "--log", "--url", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shown:
        assert shown.stdout is not None
        job_id = shown.stdout.readline().split()[0]
        lines: list[str] = []
        while not any("RUNNING" in line for line in lines) or not any("attempt 1" in line for line in lines):
            lines.append(shown.stdout.readline())  # comes while the job runs
        assert ngd("cancel", job_id, url=url).returncode == 0
        rest = shown.stdout.read()

    assert shown.returncode == 3
    assert "- steps CANCELLED - UserCancelled: cancelled by the user" in rest
    assert "\x1b" not in "".join(lines) + rest


def test_phase_that_no_job_is_in_is_named(url: str, tmp_path: Path) -> None:
    ngd("submit", spec_file(tmp_path, "steps"), url=url)

    assert (
        ngd("jobs", "--phase", "recovering", url=url).stdout == "no job is RECOVERING; see all of them with: ngd jobs\n"
    )


def test_log_is_saved_as_it_is(url: str, tmp_path: Path) -> None:
    job_id = ngd("submit", spec_file(tmp_path, "steps"), "--follow", url=url).stdout.split()[0]

    assert ngd("logs", job_id, "--output", str(tmp_path / "log"), url=url).returncode == 0
    assert "attempt 1 of steps\n" in (tmp_path / "log").read_text()
    refused = ngd("logs", job_id, "--output", str(tmp_path / "none" / "log"), url=url)
    assert (refused.returncode, "No such file" in refused.stderr) == (1, True)


def test_version_is_the_installed_one() -> None:
    result = ngd("--version")

    assert result.returncode == 0
    assert result.stdout == f"ngd {version('ngd-dist')}\n"


def test_bad_spec_is_explained_field_by_field(tmp_path: Path, url: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmodel: {kind: small_cn}\n")

    result = ngd("submit", str(path), url=url)

    assert result.returncode == 1
    assert "model.kind must be one of small_cnn, mlp, " in result.stderr
    assert """function, got "small_cn" (did you mean 'small_cnn'?)""" in result.stderr
    assert "data is missing" in result.stderr
    assert "Traceback" not in result.stderr


def test_training_alone_explains_a_bad_spec_in_the_same_words(tmp_path: Path, url: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmodel: {kind: small_cn}\nschedule: {epochs: true}\n")

    posted, trained = ngd("submit", str(path), url=url), ngd("train", str(path), "--run-dir", str(tmp_path / "run"))

    lines = posted.stderr.strip().removeprefix("ngd: ").splitlines()
    assert len(lines) >= 3
    assert [line for line in lines if line not in trained.stderr] == []
    assert "Traceback" not in trained.stderr
    assert not (tmp_path / "run").exists()


def test_spec_that_is_not_text_is_said(tmp_path: Path, url: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: \xe9\n")

    result = ngd("submit", str(path), url=url)

    assert (result.returncode, len(result.stderr.strip().splitlines())) == (1, 1)
    assert "job.yaml is not UTF-8" in result.stderr


def test_json_is_sent_as_json(shared_service: ServiceProcess) -> None:
    text = small_spec(data={"kind": "function", "function": "a:b"}).model_dump_json()
    face = text.replace('"options":{}', '"options":{"face":"\\ud83d\\ude00"}')

    assert shared_service.client.validate(face).spec["data"]["options"] == {"face": "\U0001f600"}


def test_service_that_is_not_there_is_said_in_one_sentence() -> None:
    result = ngd("jobs", url="http://127.0.0.1:1")

    assert result.returncode == 1
    assert "no service answers at http://127.0.0.1:1" in result.stderr
    assert "ngd serve" in result.stderr


def test_training_needs_no_service(tmp_path: Path) -> None:
    path = spec_file(tmp_path, "alone")

    result = ngd("train", path, "--run-dir", str(tmp_path / "run"), timeout_s=120)

    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "attempts" / "1" / "outcome.json").read_text())["result"] == "succeeded"

"""A log is had whole, by byte, by rank and as it grows; what is left out of it is said."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from ngd_service.client.client import Client, InvalidRequestError, NotFoundError
from ngd_service.dispatchers.log_file import TAIL_BYTES, LogFile, as_read
from ngd_service.resources import Job
from ngd_workers.contract.rundir import AttemptDir
from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.service_process import ServiceProcess

MIB = 1 << 20
LINE = b"line %07d\n"
LINES = b"".join(LINE % number for number in range(200_000))  # 2.5 MB


@pytest.fixture(scope="module")
def job(shared_service: ServiceProcess) -> Job:
    """One that has ended, with two workers."""
    spec = small_spec(name="steps", schedule={"steps": 1}, resources={"workers": 2}).model_dump(mode="json")
    return shared_service.client.wait(shared_service.client.submit(spec).id, timeout_s=60)


@pytest.fixture
def folder(shared_service: ServiceProcess, job: Job) -> AttemptDir:
    return AttemptDir.of(shared_service.home / "runs" / job.id, 1)


def get(
    service: ServiceProcess, job: Job, *, headers: dict[str, str] | None = None, **params: object
) -> httpx.Response:
    values = {name: str(value) for name, value in params.items()}
    return httpx.get(f"{service.url}/api/v1/jobs/{job.id}/logs", params=values, headers=headers)


def test_cut_of_a_long_log_is_said(shared_service: ServiceProcess, job: Job, folder: AttemptDir) -> None:
    folder.log.write_bytes(LINES)

    notice, _, rest = get(shared_service, job).content.partition(b"\n")

    assert notice == b"[ngd: the lines before these are had with offset or download]"
    assert LINES.endswith(rest)
    assert MIB - len(LINE) < len(rest) <= MIB
    assert get(shared_service, job, tail=2).content == LINE % 199_998 + LINE % 199_999


def test_log_is_read_whole_by_its_offsets(shared_service: ServiceProcess, job: Job, folder: AttemptDir) -> None:
    folder.log.write_bytes(LINES)

    text, offset = b"", 0
    while piece := (answer := get(shared_service, job, offset=offset)).content:
        assert answer.headers["log-start"] == str(offset)
        text, offset = text + piece, int(answer.headers["log-end"])

    assert text == LINES


def test_client_reads_it_whole_a_part_at_a_time(shared_service: ServiceProcess, job: Job, folder: AttemptDir) -> None:
    folder.log.write_bytes(LINES)

    read, offset = "", 0
    while (part := shared_service.client.log_part(job.id, offset=offset, attempt=1))[1] > offset:
        read, offset = read + part[0], part[1]

    assert read == LINES.decode()
    with pytest.raises(NotFoundError, match="no attempt 7"):
        shared_service.client.log_part(job.id, attempt=7)


def test_log_is_downloaded_as_it_is(shared_service: ServiceProcess, job: Job, folder: AttemptDir) -> None:
    written = b"\x1b[31m 10%\r 20%\r\n" + LINES
    folder.log.write_bytes(written)

    answer = get(shared_service, job, download="true")

    assert answer.content == written
    assert answer.headers["content-disposition"] == f'attachment; filename="{job.id}-a1.log"'
    assert b"".join(shared_service.client.download_log(job.id)) == written


@pytest.mark.parametrize(
    ("asked", "status", "content", "content_range"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=5-4", 416, None, "bytes */10"),
        ("lines=1-2", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
    ],
)
def test_range_is_honoured(
    shared_service: ServiceProcess,
    job: Job,
    folder: AttemptDir,
    asked: str,
    status: int,
    content: bytes | None,
    content_range: str | None,
) -> None:
    folder.log.write_bytes(b"0123456789")

    answer = get(shared_service, job, headers={"Range": asked})

    assert (answer.status_code, answer.headers.get("content-range")) == (status, content_range)
    assert content is None or answer.content == content
    assert content is not None or answer.json()["code"] == "range_not_satisfiable"


def test_log_of_one_rank_is_had(client: Client, job: Job, folder: AttemptDir) -> None:
    folder.rank_log(1).write_bytes(b"of rank 1\n")

    assert client.logs(job.id, rank=1) == "of rank 1\n"
    assert [chunk.text for chunk in client.follow_logs(job.id, rank=1)] == ["of rank 1\n"]
    assert client.logs(job.id, rank=0) == ""
    with pytest.raises(NotFoundError, match="has no rank 2; its 2 workers count from 0"):
        client.logs(job.id, rank=2)


@pytest.mark.parametrize("query", ["tail=1&offset=0", "download=true&tail=1", "download=true&follow=true"])
def test_what_does_not_go_together_is_refused(client: Client, job: Job, query: str) -> None:
    answer = client._http.get(f"/api/v1/jobs/{job.id}/logs?{query}")

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"a\nb\n", b"a\nb\n"),
        (b"\r 10%\r 20%\r100%\ndone\n", b"100%\ndone\n"),
        (b"windows\r\nlines\r\n", b"windows\nlines\n"),
        (b"\r 10%\r 20%", b" 20%"),
        (b"a\r\r\nb", b"a\nb"),
        (b"", b""),
    ],
)
def test_progress_bar_is_shown_as_it_was_last(written: bytes, shown: bytes) -> None:
    assert as_read(written) == shown


def test_progress_bar_is_followed_by_its_lines(client: Client, job: Job, folder: AttemptDir) -> None:
    folder.log.write_bytes(b"".join(b"\r%3d%%" % percent for percent in range(101)) + b"\ndone\n")

    assert "".join(chunk.text for chunk in client.follow_logs(job.id)) == "100%\ndone\n"


def test_running_job_keeps_the_newest_of_its_log_and_says_so(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service(max_log_mib=2, cancel_grace_s=0)
    job = service.client.submit(small_spec(name="waits").model_dump(mode="json"))
    wait_until(lambda: service.client.get(job.id).status.phase == "RUNNING", "the job runs")
    log = AttemptDir.of(service.home / "runs" / job.id, 1).log

    with log.open("ab") as file:
        file.write(LINES)
    wait_until(lambda: _on_disk(log) <= 2 * MIB, "the log has been bounded")

    text = get(service, job, offset=0).text
    first, *lines = text.splitlines()
    assert first.endswith("bytes were dropped, for a log keeps its newest part (NGD_MAX_LOG_MIB)]")
    assert lines[0].startswith("line ")
    assert get(service, job, tail=1).content == LINE % 199_999
    assert get(service, job, headers={"Range": "bytes=0-9"}).status_code == 416
    assert get(service, job, download="true").content.endswith(LINES[-MIB:])
    service.client.cancel(job.id)


def test_log_is_cut_where_the_file_system_takes_no_blocks_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, end: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ngd_service.dispatchers.log_file._punch", refuse)
    path = tmp_path / "log.txt"
    path.write_bytes(LINES)
    with path.open("ab") as writer:
        LogFile(path).keep(MIB)
        writer.write(b"after\n")

    part = LogFile(path).part(len(LINES))  # where a follower was

    assert part.text == b"[ngd: what stood here was dropped: the log took more than 1048576 bytes]\nafter\n"


def test_line_without_end_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * (3 * MIB))
    log = LogFile(path)

    assert log.tail().end == log.size
    assert log.part(0).end == TAIL_BYTES
    assert log.part(log.part(0).end).start == TAIL_BYTES


def _on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_unknown_parameter_of_logs_is_refused(client: Client, job: Job) -> None:
    with pytest.raises(InvalidRequestError, match="rank must be >= 0"):
        client.logs(job.id, rank=-1)

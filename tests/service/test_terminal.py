"""What a terminal is shown: nothing of others that it obeys, and a line for each job at any width."""

import os
import pty
import re
import subprocess

import pytest

from ngd_service.cli.terminal import harmless
from ngd_workers.contract.rundir import AttemptDir
from tests.support.attempts import small_spec
from tests.support.service_process import NGD, ServiceProcess

NASTY = "\x1b[31mred\x1b[0m \x1b]0;title\x07\x1b]52;c;aGk=\x1b\\ \x1b[6n \x9b2J bell\x07 \u202etxt\n"


def on_terminal(*arguments: str, columns: int = 80) -> str:
    """Returns what the command shows on a terminal of this width."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": str(columns)}
    with subprocess.Popen([*NGD, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (NASTY, "red    bell\\x07 txt\n"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b", ""),
        ("\x1b[", ""),
        ("a\x08b\x00", "a\\x08b\\x00"),
        ("\x1bP1;2|data\x1b\\after", "after"),
        ("grün 日本", "grün 日本"),
    ],
)
def test_text_is_made_harmless(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_log_sends_no_control_sequence_to_a_terminal_unasked(shared_service: ServiceProcess) -> None:
    client = shared_service.client
    job = client.wait(
        client.submit(small_spec(name="steps", schedule={"steps": 1}).model_dump(mode="json")).id, timeout_s=60
    )
    AttemptDir.of(shared_service.home / "runs" / job.id, 1).log.write_text(NASTY)

    for arguments in (("logs", job.id), ("logs", job.id, "--follow")):
        assert "\x1b" not in on_terminal(*arguments, "--url", shared_service.url)
    assert NASTY.strip() in on_terminal("logs", job.id, "--raw", "--url", shared_service.url)


@pytest.mark.parametrize(("columns", "has_step"), [(80, False), (200, True)])
def test_jobs_have_a_whole_line_each(shared_service: ServiceProcess, columns: int, has_step: bool) -> None:
    client = shared_service.client
    spec = small_spec(name="longer-names", schedule={"steps": 12345}).model_dump(mode="json")
    job = client.cancel(client.submit(spec).id)
    created = f"{job.created_at:%Y-%m-%d %H:%MZ}"

    shown = on_terminal("jobs", "--limit", "1", "--url", shared_service.url, columns=columns)
    lines = harmless(shown).splitlines()

    assert len(lines) == 2
    assert re.search(rf"^{job.id} +longer-names +\S [A-Z]+ ", lines[1])
    assert created in lines[1]
    assert len(lines[1].rstrip()) <= columns
    assert ("step" in lines[0].split()) is has_step

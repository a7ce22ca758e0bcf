"""A rank's own log has what it printed and logged, and costs nothing where it can't be written."""

import logging
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngd_workers.report.rank_log import kept_in


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The root logger as a driver sets it up: with a handler that holds the stream of before."""
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[rank 1] %(message)s"))
    monkeypatch.setattr(root, "handlers", [handler])
    before = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(before)


@pytest.mark.usefixtures("root")
def test_what_a_rank_writes_is_in_its_file_and_in_the_common_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log-rank-1.txt"

    with kept_in(path):
        sys.stdout.write("printed\n")
        sys.stderr.write("complained\n")
        logging.getLogger("ngd_workers.train.loop").info("logged")
    sys.stdout.write("after\n")
    logging.getLogger("ngd_workers.train.loop").info("logged after")

    assert path.read_text() == "printed\ncomplained\n[rank 1] logged\n"
    assert capsys.readouterr().out == "printed\nafter\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_second_start_of_a_rank_goes_on_in_its_file(tmp_path: Path) -> None:
    for _ in range(2):
        with kept_in(tmp_path / "log"):
            sys.stdout.write("started\n")

    assert (tmp_path / "log").read_text() == "started\nstarted\n"


def test_file_that_can_not_be_made_costs_the_copy_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with kept_in(tmp_path / "none" / "log"):
        sys.stdout.write("printed\n")

    assert capsys.readouterr().out == "printed\n"


def test_full_disk_costs_the_copy_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with kept_in(Path("/dev/full")):
        for _ in range(3):
            sys.stdout.write("printed\n")
            logging.getLogger("ngd_workers.train.loop").error("logged")
        sys.stdout.flush()

    shown = capsys.readouterr()
    assert shown.out == "printed\n" * 3
    assert "No space" not in shown.err

"""What `make demo` makes of jobs that end well, end badly or lose their service; a fault driver stands for training."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy import demo
from tests.support.attempts import small_spec
from tests.support.compared import run
from tests.support.deadline import wait_until
from tests.support.service_process import FAULT_DRIVER


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(demo, "HOME", tmp_path / "demo")
    monkeypatch.setattr(demo, "PATIENCE_S", 0.5)
    monkeypatch.setenv("NGD_DRIVER_COMMAND", json.dumps(FAULT_DRIVER))
    monkeypatch.setenv("NGD_TICK_S", "0.1")
    monkeypatch.setenv("COLUMNS", "200")
    yield tmp_path / "demo"
    for noted in tmp_path.glob("demo/runs/*/attempts/*/process.json"):
        group = json.loads(noted.read_text())["pid"]
        if psutil.pid_exists(group):
            os.killpg(group, signal.SIGKILL)


def recipes(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    path = folder / "recipe.json"
    path.write_text(small_spec(name=name, schedule={"steps": 20}, **changes).model_dump_json())
    monkeypatch.setattr(demo, "RECIPES", dict.fromkeys(demo.RECIPES, str(path)))


@pytest.mark.parametrize(
    ("name", "changes", "status", "words"),
    [
        ("steps", {}, 0, "90.00%"),
        (
            "steps",
            {"target": {"metric": "accuracy", "value": 0.97}},
            1,
            "failed: SP-NGD did not reach its target, test accuracy at least 97.00%",
        ),
        ("refuses", {}, 1, "failed: no folder '[/x]'; set NGD_DATA_DIR"),
    ],
)
def test_status_is_0_only_if_both_jobs_succeeded_and_reached_the_target(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, object],
    status: int,
    words: str,
) -> None:
    recipes(tmp_path, monkeypatch, name, **changes)

    assert demo.main() == status
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        (
            (44, 8.8),
            (77, 4.4),
            "To accuracy at least 97.00%, SP-NGD was first in steps (44 steps; SGD took 77 steps), and SGD was first "
            "in seconds (4.4 s; SP-NGD took 8.8 s): a step of SP-NGD measures the curvature",
        ),
        (
            (44, 2.2),
            (77, 4.4),
            "SP-NGD was first in steps (44 steps; SGD took 77 steps) and in seconds (2.2 s; SGD took",
        ),
        (
            None,
            (77, 4.4),
            "Only SGD reached accuracy at least 97.00%, at step 77 after 4.4 s; SP-NGD did not reach it.",
        ),
    ],
)
def test_result_is_told_in_a_sentence(
    ours: tuple[int, float] | None, other: tuple[int, float] | None, words: str
) -> None:
    runs = {name: run("SUCCEEDED", reached) for name, reached in (("SP-NGD", ours), ("SGD", other))}

    assert words in demo.in_words(runs)


def the_service() -> psutil.Process:
    """Returns the demo's own: other tests may keep one in this process too."""
    return next(child for child in psutil.Process().children() if str(demo.HOME) in child.cmdline())


def test_service_that_dies_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    recipes(tmp_path, monkeypatch, "waits")

    def kill_the_service_once_a_job_runs() -> None:
        wait_until(lambda: list(home.glob("runs/*/attempts/1/events.jsonl")), "a job runs", timeout_s=60)
        the_service().kill()

    killer = threading.Thread(target=kill_the_service_once_a_job_runs)
    killer.start()

    with pytest.raises(SystemExit, match=r"the service has ended with status -9; see .*service\.log"):
        demo.main()
    killer.join()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Takes interrupts as a shell's own command does: a process that was started in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_interrupt_cancels_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    recipes(tmp_path, monkeypatch, "waits")

    def interrupt_once_a_job_runs() -> None:
        wait_until(lambda: list(home.glob("runs/*/attempts/1/events.jsonl")), "a job runs", timeout_s=60)
        assert os.getpgid(the_service().pid) != os.getpgid(0)  # Ctrl-C goes to a whole group
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt_once_a_job_runs)
    interrupter.start()

    with pytest.raises(KeyboardInterrupt):
        demo.main()
    interrupter.join()
    (outcome,) = home.glob("runs/*/attempts/1/outcome.json")
    assert json.loads(outcome.read_text())["result"] == "cancelled"


def test_large_batch_says_which_data_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NGD_DATA_DIR", raising=False)

    with pytest.raises(SystemExit, match="NGD_DATA_DIR"):
        demo.main(["large-batch"])

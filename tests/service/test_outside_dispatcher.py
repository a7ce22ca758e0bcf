"""A dispatcher of another package: named by its class, with settings of its own (examples/extending)."""

import sys
from pathlib import Path

import pytest

from ngd_service.dispatchers.base import Launch
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.errors import StartupError
from ngd_service.failpoint import Failpoint
from ngd_service.settings import load_settings
from tests.support.attempts import small_spec
from tests.support.backends import REF, drivers_in, folder_in, local_backend
from tests.support.deadline import wait_until
from tests.support.service_process import FAULT_DRIVER

GENTLE = "gentle_dispatcher:GentleDispatcher"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "extending")
    monkeypatch.delitem(sys.modules, "gentle_dispatcher", raising=False)


def test_its_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGD_DISPATCHER", GENTLE)
    monkeypatch.setenv("NGD_NICENESS", "7")

    settings = load_settings()

    assert settings.niceness == 7
    assert settings.dispatcher_class.__name__ == "GentleDispatcher"


def test_its_bounds_are_checked() -> None:
    with pytest.raises(StartupError, match=r"niceness \(NGD_NICENESS\).*less than or equal to 19.*got 20"):
        load_settings(dispatcher=GENTLE, niceness=20)


def test_settings_of_the_others_are_refused() -> None:
    with pytest.raises(StartupError, match=r"ray_address \(NGD_RAY_ADDRESS\) is for the dispatcher ray_jobs"):
        load_settings(dispatcher=GENTLE, ray_address="http://head:8265")


def test_attempts_run_as_it_says(tmp_path: Path) -> None:
    settings = load_settings(dispatcher=GENTLE, niceness=7)
    files = AttemptFiles(runs_dir=tmp_path, data_dir=None, worker_url="http://127.0.0.1:1", cluster="own")
    with local_backend(tmp_path) as backend:
        dispatcher = settings.dispatcher_class.of(settings, files, command=FAULT_DRIVER, failpoint=Failpoint(None))
        backend.made.append(dispatcher)

        dispatcher.submit(Launch(REF, small_spec(name="waits").model_dump(mode="json"), "token"))
        wait_until(lambda: drivers_in(folder_in(backend).path), "the driver runs")

        assert drivers_in(folder_in(backend).path)[0].nice() >= 7


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package:Class", "can't be imported: No module named 'no_such_package'"),
        ("gentle_dispatcher:Missing", "has no attribute 'Missing'"),
        ("gentle_dispatcher:GentleSettings", "must be a class derived from Dispatcher"),
        ("slurm", "input should be 'local', 'ray_jobs' or 'kuberay', got 'slurm'"),
    ],
)
def test_class_that_is_no_dispatcher_is_refused(name: str, words: str) -> None:
    with pytest.raises(StartupError, match=words):
        load_settings(dispatcher=name)

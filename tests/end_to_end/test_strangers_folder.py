"""The service and its jobs start in a folder whose packages have the names of this repository's own folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ngd_workers.contract.spec_file import load_spec
from tests.support import ROOT
from tests.support.service_process import ServiceProcess

RECIPE = ROOT / "workers" / "ngd_workers" / "recipes" / "digits.yaml"
TRAINING_S = 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stranger's folder; whoever imports a package of it fails."""
    for name in ("workers", "service", "ngd_dist_test"):
        package = tmp_path / "theirs" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError(f'{__name__} is the stranger\\'s')\n")
    return tmp_path / "theirs"


def test_service_trains_the_digits_recipe_from_there(folder: Path, tmp_path: Path) -> None:
    spec = load_spec(RECIPE).model_dump(mode="json")
    spec |= {"schedule": {"steps": 4}, "resources": spec["resources"] | {"workers": 1}}
    service = ServiceProcess(tmp_path / "home", folder=folder, driver_command=None)
    try:
        ended = service.client.wait(service.client.submit(spec).id, timeout_s=TRAINING_S)
    finally:
        service.close()

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1), ended.status.message


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([str(Path(sys.executable).with_name("ngd")), "--version"], "ngd 0."),
        ([sys.executable, "-m", "ngd_workers", "--help"], "--run-dir"),
    ],
    ids=["ngd", "ngd_workers"],
)
def test_commands_start_from_there(folder: Path, command: list[str], words: str) -> None:
    there = os.environ | {"PYTHONPATH": "."}

    started = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=True)

    assert words in started.stdout

"""A user's file that imports the installed wheels is type-checked in full, without a plugin and without an ignore."""

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

USERS_FILE = """\
import torch

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, ExponentialDamping

model = torch.nn.Linear(3, 2)
config = NGDConfig(lr=0.1, preconditioner=EKFAC(), damping_rule=ExponentialDamping(factor=0.5))
optimizer = NGD(model, config)
model(torch.ones(4, 3)).square().mean().backward()
optimizer.step()
reveal_type(optimizer)
reveal_type(config.lr)
"""


@pytest.fixture(scope="module")
def environment(uv: str, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the library's wheel, and with torch from this one."""
    folder = tmp_path_factory.mktemp("user")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    wheel = next(wheels.glob("ngd_dist-*.whl"))
    subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), str(wheel)], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A .pth file inside the folder that a .pth names is not read: this checkout stays out of sight.
    (Path(site) / "torch_from_here.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def mypy(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "training.py").write_text(text)
    python = folder / "venv" / "bin" / "python"
    # A cache of its own makes the next runs take a second; the first one reads all of torch.
    cache = ROOT / ".mypy_cache" / "user"
    command = [str(Path(sys.executable).with_name("mypy")), "--strict", "--config-file=", "--cache-dir", str(cache)]
    return subprocess.run(
        [*command, "--python-executable", str(python), "training.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("package", ["ngd_dist", "ngd_workers", "ngd_service"])
def test_wheel_says_that_it_is_typed(wheels: Path, package: str) -> None:
    with zipfile.ZipFile(next(wheels.glob(f"{package}-*.whl"))) as wheel:
        assert f"{package}/py.typed" in wheel.namelist()


def test_users_file_passes_strict_checks(environment: Path) -> None:
    checked = mypy(environment, USERS_FILE)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.findall(r'Revealed type is "(.*)"', checked.stdout) == ["ngd_dist.optimizer.NGD", "float"]


def test_wrong_setting_in_a_users_file_is_found(environment: Path) -> None:
    checked = mypy(environment, USERS_FILE.replace("lr=0.1", "learning_rate=0.1"))

    assert checked.returncode == 1
    assert 'Unexpected keyword argument "learning_rate" for "NGDConfig"' in checked.stdout

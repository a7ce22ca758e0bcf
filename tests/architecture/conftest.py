"""The wheels of the three distributions, as an index would hand them out."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.fixture(scope="session")
def uv() -> str:
    return str(Path(sys.executable).with_name("uv"))


@pytest.fixture(scope="session")
def wheels(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel of each."""
    target = tmp_path_factory.mktemp("wheels")
    for folder in (ROOT, ROOT / "workers", ROOT / "service"):
        subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", str(target), str(folder)], check=True)
    return target

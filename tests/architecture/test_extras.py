"""Each extra brings what its part needs, into an empty environment, and nothing heavier."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = str(Path(sys.executable).with_name("uv"))
# What each extra must make importable, and what it must not bring.
EXTRAS = {
    "": ("ngd_dist.config, ngd_dist.cost, ngd_dist.errors, workers.spec, workers.events", {"torch", "numpy"}),
    "train": ("ngd_dist.optimizer", {"numpy", "ray", "torchvision", "transformers", "timm", "fastapi"}),
    "workers": ("workers.loop, workers.driver, ray.train.torch", {"fastapi", "sqlalchemy"}),
    "deepspeed": ("ngd_dist.optimizer, deepspeed", {"ray", "fastapi"}),
    "service": ("service.app, service.cli, service.dashboard", {"torch", "ray", "psycopg"}),
    "postgres": ("service.app, psycopg", {"torch", "ray"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_is_enough_for_its_part(tmp_path: Path, extra: str) -> None:
    wanted, unwanted = EXTRAS[extra]
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    package = f"{ROOT}[{extra}]" if extra else str(ROOT)
    subprocess.run([UV, "pip", "install", "--quiet", "--python", python, package], check=True)

    code = f"""
import importlib.util, {wanted}
brought = [name for name in {sorted(unwanted)} if importlib.util.find_spec(name)]
assert not brought, brought
"""
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)

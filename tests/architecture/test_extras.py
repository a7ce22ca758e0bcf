"""Each distribution and extra brings what its part needs, into an empty environment, and nothing heavier."""

import subprocess
import sys
from pathlib import Path

import pytest

NOT_OF_THE_LIBRARY = {"ngd_workers", "ngd_service", "workers", "service"}
# What each must make importable, and what it must not bring.
EXTRAS = {
    "ngd-dist": (
        "ngd_dist.config, ngd_dist.cost.plan, ngd_dist.factors.cost, ngd_dist.errors",
        {"torch", "numpy", *NOT_OF_THE_LIBRARY},
    ),
    "ngd-dist[train]": (
        "ngd_dist.optimizer",
        {"numpy", "ray", "torchvision", "transformers", "timm", "fastapi", *NOT_OF_THE_LIBRARY},
    ),
    "ngd-dist[sklearn]": (
        "ngd_dist.exact.logistic",
        {"ray", "torchvision", "transformers", "fastapi", "gpytorch", *NOT_OF_THE_LIBRARY},
    ),
    "ngd-workers": ("ngd_workers.contract.spec, ngd_workers.contract.spec_file", {"torch", "numpy", "ngd_service"}),
    "ngd-workers[train]": (
        "ngd_workers.train.loop, ngd_workers.train.baselines, ngd_workers.launch.driver, ray.train.torch",
        {"fastapi", "sqlalchemy", "ngd_service"},
    ),
    "ngd-workers[deepspeed]": ("ngd_dist.optimizer, deepspeed", {"fastapi"}),
    "ngd-service": ("ngd_service.app, ngd_service.cli.commands, ngd_service.dashboard", {"torch", "ray", "psycopg"}),
    "ngd-service[postgres]": ("ngd_service.app, psycopg", {"torch", "ray"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", EXTRAS)
def test_package_is_enough_for_its_part(uv: str, wheels: Path, tmp_path: Path, package: str) -> None:
    wanted, unwanted = EXTRAS[package]
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python, "--find-links", str(wheels)]
    subprocess.run([*install, package], cwd=tmp_path, check=True)

    code = f"""
import importlib.util, {wanted}
brought = [name for name in {sorted(unwanted)} if importlib.util.find_spec(name)]
assert not brought, brought
"""
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)

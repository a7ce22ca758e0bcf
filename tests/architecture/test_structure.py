"""The structure that the documents promise, held by reading the code."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

SHIPPED = sorted(
    p for package in ("ngd_dist", "workers/ngd_workers", "service/ngd_service") for p in (ROOT / package).rglob("*.py")
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
# Which file alone may import a module: everything else goes through it.
ONLY_HERE = {
    "ray": tuple(f"workers/ngd_workers/launch/{name}.py" for name in ("driver", "ray_cluster", "ray_group")),
    "sqlalchemy": ("service/ngd_service/store/",),
    "alembic": ("service/ngd_service/store/",),
    "kubernetes": ("service/ngd_service/dispatchers/rayjob_api.py",),
}
COLLECTIVES = {"all_reduce", "all_to_all_single", "all_gather_object", "broadcast"}


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_import_layers_hold() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("module", ONLY_HERE)
def test_a_library_is_known_in_one_place(module: str) -> None:
    knowing = {
        str(path.relative_to(ROOT))
        for path in SHIPPED
        if any(name == module or name.startswith(module + ".") for name in imports(path))
    }

    assert {path for path in knowing if not path.startswith(ONLY_HERE[module])} == set()
    assert knowing


def test_only_comm_calls_collectives() -> None:
    calling = {
        str(path.relative_to(ROOT))
        for path in SHIPPED
        for node in nodes(path)
        if isinstance(node, ast.Attribute)
        and node.attr in COLLECTIVES
        and isinstance(node.value, ast.Name)
        and node.value.id == "dist"
    }

    assert calling == {"ngd_dist/distributed/comm.py"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.is_relative_to(ROOT / "ngd_dist")], ids=lambda p: p.stem)
def test_an_engine_is_named_in_its_own_file_alone(path: Path) -> None:
    # Its settings, and its costs, are told without torch.
    if path.parent.name == "engines" or path.name == "deepspeed.py" or path.match("cost/engines.py"):
        return

    assert not re.search(r"DDP|DistributedDataParallel|FSDP|fully_shard|[Dd]eep[Ss]peed|ZeRO|DTensor", path.read_text())


def test_the_environment_is_read_in_one_place() -> None:
    reading = {str(p.relative_to(ROOT)) for p in SHIPPED if "os.environ" in p.read_text() or "getenv" in p.read_text()}

    assert reading <= {
        "service/ngd_service/settings.py",
        "service/ngd_service/dispatchers/local.py",
        "workers/ngd_workers/launch/own_code.py",
        "workers/ngd_workers/launch/ray_cluster.py",
        "workers/ngd_workers/launch/ray_group.py",
    }


def test_no_module_is_a_dumping_ground() -> None:
    names = {part for path in SHIPPED for part in path.relative_to(ROOT).with_suffix("").parts}

    assert not names & {"utils", "helpers", "common", "misc", "core", "manager"}


def test_public_names_change_only_on_purpose() -> None:
    import ngd_dist
    from ngd_dist import config

    assert set(ngd_dist.__all__) == {"NGD", "NGDConfig", "Preconditioner", "ShardedState", "__version__", "part_of"}
    assert set(config.NGDConfig.model_fields) == {
        "preconditioner", "fisher", "staleness", "strategy", "lr", "momentum", "momentum_mode", "weight_decay",
        "weight_rescaling", "damping", "damping_rule", "step_length", "clip", "burn_in", "fallback", "ema_decay",
        "inversion", "inverse_dtype", "max_failed_inversions", "stagger", "refresh_cap", "max_dense", "exclude",
        "batch_dim", "statistics_wire", "bucket_mb", "micro_batches", "loss_reduction", "non_finite",
        "statistics_fraction",
    }  # fmt: skip


def test_the_three_distributions_are_of_one_version() -> None:
    import ngd_dist

    for folder, needs in {"workers": "ngd-dist", "service": "ngd-workers"}.items():
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        assert project["version"] == ngd_dist.__version__
        assert f"{needs}=={ngd_dist.__version__}" in project["dependencies"]


def test_the_training_loop_needs_torch_and_pydantic_alone() -> None:
    """A machine with a GPU may have nothing else; data formats and launchers import what they need when used."""
    code = """
import sys
import tomllib
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"numpy", "yaml", "httpx", "ray", "sklearn", "torchvision", "fastapi", "psutil"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import warnings
warnings.simplefilter("ignore")  # torch misses numpy
import ngd_dist.optimizer, ngd_workers.train.loop
"""

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_optimizer_without_torch_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; from ngd_dist import NGD"

    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert "ngd_dist.NGD needs torch" in ended.stderr
    assert "pip install 'ngd-dist[train]'" in ended.stderr

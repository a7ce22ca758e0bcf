"""Packages that a job asks for: uv installs real wheels of a folder, with no index in reach."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec_problems import parse_spec
from ngd_workers.launch import requirements
from ngd_workers.launch.attempt import run_rank
from ngd_workers.launch.requirements import installed
from tests.support.attempts import make_attempt
from tests.support.own_code import wheel, write


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that asks for two packages beside installed ones."""
    wheel(tmp_path / "wheels", "tinyone", "1.0", ["pydantic>=2", "tinytwo"])
    wheel(tmp_path / "wheels", "tinytwo", "2.0")
    wheel(tmp_path / "wheels", "ofold", "1.0", ["pydantic<2"])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    return write(tmp_path / "theirs", {"requirements.txt": "tinyone\npydantic\n"}) / "requirements.txt"


def modules(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.py"))


def test_packages_that_are_missing_here_are_installed_once(wanted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(installed, [wanted, wanted])
    monkeypatch.setattr(requirements, "_install", lambda *_: pytest.fail("it is there"))

    assert first == second == installed(wanted)
    assert modules(first) == ["tinyone.py", "tinytwo.py"]
    code = "import sys; sys.path.append(sys.argv[1]); import tinytwo; print(tinytwo.VERSION)"
    run = subprocess.run([sys.executable, "-c", code, str(first)], capture_output=True, text=True, check=True)
    assert run.stdout == "2.0\n"


def test_file_that_asks_for_other_packages_has_another_folder(wanted: Path) -> None:
    first = installed(wanted)
    wanted.write_text("tinytwo\n")

    assert modules(installed(wanted)) == ["tinytwo.py"] != modules(first)


def test_package_of_the_users_own_folder_is_built_in(wanted: Path) -> None:
    wheel(wanted.parent / "vendored", "local", "0.1")
    wanted.write_text("./vendored/local-0.1-py3-none-any.whl\n")

    assert modules(installed(wanted)) == ["local.py"]


def test_nothing_is_installed_if_all_is_there(wanted: Path) -> None:
    wanted.write_text("pydantic>=2\n")

    assert list(installed(wanted).iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "ofold\n",
            r"ofold depend on pydantic<2 .* your requirements are unsatisfiable; what the workers have installed",
        ),
        ("nosuchpackage\n", r"requirements\.txt: No solution found .* nosuchpackage"),
        ("a b ==\n", r"Couldn't parse requirement"),
    ],
)
def test_reason_is_uvs_own(wanted: Path, text: str, words: str) -> None:
    wanted.write_text(text)

    with pytest.raises(SpecError, match=words) as caught:
        installed(wanted)
    assert "\n" not in str(caught.value)
    assert list((Path.home() / ".cache" / "ngd" / "requirements").glob(".new-*")) == []


def test_file_that_is_not_there_is_named(wanted: Path) -> None:
    wanted.unlink()

    with pytest.raises(SpecError, match=r"can't read code\.requirements requirements\.txt: No such file"):
        installed(wanted)


LOOP = """
import os

import tinyone
import tinytwo


def train(context):
    with open("words.txt") as file:
        assert file.read() == os.environ["WORDS"]
    context.report({"loss": float(tinytwo.VERSION)})
"""


def test_own_loop_imports_its_packages(wanted: Path) -> None:
    folder = write(wanted.parent, {"loop_of_a_test.py": LOOP, "words.txt": "here"})
    spec = parse_spec(
        {
            "name": "loop",
            "train": {"function": "loop_of_a_test:train"},
            "code": {"requirements": "requirements.txt"},
            "env": {"WORDS": "here"},
        }
    )
    attempt = make_attempt(folder.parent / "run", spec, code=folder)

    outcome = run_rank(attempt)

    assert (outcome.result, outcome.metrics) == ("succeeded", {"loss": 2.0}), outcome.message
    assert str(folder) not in sys.path

"""Names of modules and files in pages and in docstrings are names of today."""

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.support import ROOT

PACKAGES = ("ngd_dist", "workers/ngd_workers", "service/ngd_service")
# What was true of its day: it is not rewritten.
HISTORY = ("CHANGELOG.md", "benchmarks/results/")
CODE_SPAN = re.compile(r"(?<!`)(`{1,2})([^`]+)\1(?!`)")
FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"[a-z_]+\.[A-Z]\w+")  # of a folder: `module.Class`, where to start
MODULE = re.compile(r"(?:ngd_dist|ngd_workers|ngd_service)(?:\.\w+)+")
FILE = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|js|css|yaml|toml|json|sh|svg)|(?:[\w.-]+/)+")
# Folders whose names begin a path of this repository; other paths are of a user's machine or of a cluster.
OURS = {"benchmarks", "deploy", "docker", "docs", "examples", "helm", "ngd_dist", "service", "tests", "workers"}


@cache
def tracked() -> frozenset[PurePosixPath]:
    """Returns the files of the repository, those that are not committed yet among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return frozenset(PurePosixPath(path) for path in listed if (ROOT / path).exists())


def pages() -> list[PurePosixPath]:
    return sorted(path for path in tracked() if path.suffix == ".md" and not str(path).startswith(HISTORY))


def modules() -> list[PurePosixPath]:
    return sorted(path for path in tracked() if path.suffix == ".py" and path.parts[0] in {*OURS} - {"benchmarks"})


def docstrings(path: PurePosixPath) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def stale(text: str, page: PurePosixPath) -> list[str]:
    """Returns the code spans of the text that look like a module or a file of ours and are none."""
    places = [page.parent, *map(PurePosixPath, (".", *PACKAGES, "tests/ngd_dist"))]
    wrong = []
    for span in (span.removesuffix("()") for _, span in CODE_SPAN.findall(FENCED.sub("", text))):
        if MODULE.fullmatch(span):
            wrong += [] if is_importable(span) else [span]
        elif page.name == "__init__.py" and ENTRY.fullmatch(span):
            wrong += [] if is_importable(f"{package_of(page)}.{span}") else [span]
        elif FILE.fullmatch(span) and (span.endswith(".py") or span.partition("/")[0] in OURS):
            wrong += [] if any(is_there(place / span) for place in places) else [span]
    return wrong


def package_of(init: PurePosixPath) -> str:
    parts = init.parent.parts
    return ".".join(parts[1:] if parts[0] in ("workers", "service") else parts)


def is_there(path: PurePosixPath) -> bool:
    return any(file == path or path in file.parents for file in tracked())


def is_importable(name: str) -> bool:
    module, attributes = name, list[str]()
    while True:
        try:
            value = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
            if not module:
                return False
    for attribute in attributes:
        if attribute in getattr(value, "model_fields", {}):
            return True
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True


@pytest.mark.parametrize("page", pages(), ids=str)
def test_pages_name_what_is_there(page: PurePosixPath) -> None:
    assert stale((ROOT / page).read_text(), page) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules()}), ids=str)
def test_docstrings_name_what_is_there(folder: PurePosixPath) -> None:
    wrong = {
        str(path): names
        for path in modules()
        if path.parent == folder and (names := [name for text in docstrings(path) for name in stale(text, path)])
    }

    assert wrong == {}


def test_each_formula_has_its_function_and_its_test() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "algorithm.md").read_text().splitlines() if line[:2] == "| "]
    defined = "\n".join((ROOT / path).read_text() for path in modules() if path.parts[0] == "tests")
    functions = [name for row in rows for name in re.findall(r"`(\w+(?:\.\w+)+)`", row[-3]) if not name.endswith(".py")]
    tests = [name for row in rows for name in re.findall(r"`(test_\w+)`", row[-2])]

    assert len(functions) > 20
    assert len(tests) > 50
    assert [name for name in functions if not is_importable(f"ngd_dist.{name}")] == []
    assert [name for name in tests if f"def {name}(" not in defined] == []

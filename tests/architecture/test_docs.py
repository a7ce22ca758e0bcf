"""The site builds without a warning, shows what the code says, and fetches nothing from elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

GENERATE = ROOT / "docs" / "reference" / "generate.py"
FETCHED = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(https?:)?//')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [str(Path(sys.executable).with_name("mkdocs")), "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, (
        built.stdout + built.stderr
    )  # --strict: a link, an anchor or a class that is not there
    return folder


def test_pages_made_from_the_code_are_current() -> None:
    stale = subprocess.run([sys.executable, str(GENERATE), "--check"], capture_output=True, text=True, check=False)

    assert (stale.stdout.split(), stale.stderr) == ([], ""), "run: make docs"


@pytest.mark.parametrize(
    "page", ["optimizer.html", "layers.html", "preconditioners.html", "strategies.html", "transforms.html"]
)
def test_reference_shows_public_classes(site: Path, page: str) -> None:
    text = (site / "reference" / page).read_text()

    assert re.search(r'<h\d id="ngd_dist\.[\w.]+"', text)
    assert "doc-class" in text


def test_reference_lays_docstrings_out(site: Path) -> None:
    text = (site / "reference" / "optimizer.html").read_text()

    assert "<li>\n<p><code>model</code>: " in text
    assert "<strong>Raises</strong>" in text


def test_every_pitfall_has_its_test() -> None:
    page = (ROOT / "docs" / "guides" / "pitfalls.md").read_text()
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| pitfall", "| loop"))
    ]
    named = [re.findall(r"`((?:engines/)?test_\w+\.py)(?:::(\w+))?`", row.rsplit("|", 2)[1]) for row in rows]

    assert len(rows) > 50
    assert all(named)
    for file, test in (found for row in named for found in row):
        source = (ROOT / "tests" / "ngd_dist" / file).read_text()
        assert f"def {test or 'test_'}" in source, f"{file}::{test}"


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    fetching = {page.name for page in site.rglob("*.html") if FETCHED.search(page.read_text())}

    assert fetching == set()


@pytest.mark.parametrize(
    "words",
    ["job file", "own model", "tutorial", "quickstart", "inference", "weights", "multi-node", "torch.compile", "SLURM"],
)
def test_search_finds_what_people_look_for(site: Path, words: str) -> None:
    pages = json.loads((site / "search" / "search_index.json").read_text())["docs"]

    assert any(words.lower() in f"{page['title']} {page['text']}".lower() for page in pages)

"""The files that state the version state the same one."""

import re

import pytest

from ngd_dist import __version__
from tests.support import ROOT

STATED = {
    "workers/pyproject.toml": r'^version = "(.+)"$',
    "service/pyproject.toml": r'^version = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "helm/ngd/Chart.yaml": r'^appVersion: "(.+)"$',
    "CHANGELOG.md": r"^## (\d+\.\d+\.\d+)",
}


@pytest.mark.parametrize("file", STATED)
def test_it_is_that_of_the_library(file: str) -> None:
    found = re.search(STATED[file], (ROOT / file).read_text(), re.MULTILINE)

    assert found is not None
    assert found[1] == __version__

"""Curves of the exact methods tell steps and seconds to a target; each part has its table and its figure."""

import math
from pathlib import Path

import pytest

from benchmarks.exact import arrivals
from benchmarks.exact.curves import curve, follow, to_reach
from benchmarks.exact.plots import FIGURES
from benchmarks.exact.tables import table
from benchmarks.report import Result, page, parts_of

SLOW, QUICK = [[0, 0.0, 1.0], [5, 2.0, 0.02]], [[0, 0.0, 1.0], [1, 0.5, 0.05], [4, 1.5, 0.002]]


def test_course_has_the_score_after_its_steps() -> None:
    scores = iter(range(100, 0, -1))

    points = follow(lambda: None, lambda: float(next(scores)), 20, stride=10)

    assert [points[0][0], points[-1][0]] == [0, 200]
    assert [point[2] for point in points] == sorted((point[2] for point in points), reverse=True)


def test_target_that_is_missed_costs_without_end() -> None:
    assert to_reach(QUICK, 0.1) == (1, 0.5)
    assert to_reach(SLOW, 0.01) == (math.inf, math.inf)


def test_table_counts_the_seeds_that_reach_a_target() -> None:
    rows = [curve("Poisson", "Adam", seed, points) for seed, points in enumerate((QUICK, QUICK, SLOW))]

    text = table({"equations": rows})

    assert "| Poisson | Adam | 4 (1.5 s), 2 of 3 | never, 0 of 3 |" in text


def test_transport_finds_layers_whose_squared_error_skips_cycles() -> None:
    rows = {(row["loss"], row["metric"]): row for row in arrivals.arrivals(1.0, 3)}

    assert rows["transport", "Wasserstein"]["shift"] > 0.5 / arrivals.FREQUENCY  # half a period
    assert rows["transport", "Wasserstein"]["error"] < 1e-6
    assert all(rows["squared_error", metric]["error"] > 0.05 for metric in ("L2", "H^1", "H^-1"))


def test_page_shows_the_figure_of_each_part(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "2026-01-01_exact_cpu2"
    folder.mkdir()
    (folder / "README.md").write_text("# Title\n")
    (folder / "result.json").write_text('{"rates": [], "growth": []}')

    assert parts_of(Result(folder)) == ["rates", "growth"]
    assert f"![{FIGURES['rates'][0]}](performance/exact-rates_cpu2.svg)" in page([Result(folder)])

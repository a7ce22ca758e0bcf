"""docs/performance.md is what the command makes from the results in the tree."""

import json
from pathlib import Path

import pytest

from benchmarks.report import DOCS, Result, methods_page, newest, page, plots


def test_page_is_current() -> None:
    assert (DOCS / "performance.md").read_text() == page(newest()), "run: python -m benchmarks.report"


def test_plots_of_the_page_exist() -> None:
    shown = [line.split("(", 1)[1].rstrip(")") for line in page(newest()).splitlines() if line.startswith("![")]

    assert shown
    assert all((DOCS / path).exists() for path in shown)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for date, total in (("2026-01-01", 1), ("2026-01-02", 2)):
        folder = tmp_path / f"{date}_memory_cpu2"
        folder.mkdir()
        (folder / "README.md").write_text(f"# Bytes\n\n## mlp\n\n| total |\n|---|\n| {total} |\n\nMeasured on: x.\n")
        row = {"model": "mlp", "ranks": 1, "optimizer": "sgd", "bytes": {"weights": total}}
        (folder / "result.json").write_text(json.dumps({"environment": {"torch": "2"}, "rows": [row]}))
    return tmp_path


def test_the_newest_result_of_a_question_is_shown_and_missing_ones_are_named(results: Path) -> None:
    text = page(newest(results))

    assert "### mlp\n\n| total |\n|---|\n| 2 |" in text
    assert "| 1 |" not in text
    assert "From `benchmarks/results/2026-01-02_memory_cpu2`: torch 2." in text
    assert "Not measured yet: step-overhead," in text


def test_plots_are_drawn_the_same_twice(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("matplotlib")

    first, second = (
        [path.read_bytes() for path in plots(newest(results), tmp_path_factory.mktemp("docs"))] for _ in range(2)
    )

    assert first == second
    assert b"<svg" in first[0]


def test_a_folder_without_figures_is_named_by_its_readme(tmp_path: Path) -> None:
    folder = tmp_path / "2026-01-01_profile_cpu2"
    folder.mkdir()
    (folder / "README.md").write_text("# Profile\n\nBatchNorm.\n")

    assert "BatchNorm." in page([Result(folder)])


def test_page_begins_with_seconds_and_steps_to_each_target(tmp_path: Path) -> None:
    folder = tmp_path / "2026-01-01_methods_cpu2"
    folder.mkdir()
    (folder / "README.md").write_text("# Seconds\n")
    figures = {"kfac": [(2.0, 20), (3.0, 30), (4.0, 24)], "muon": [(2.5, 48)] * 3, "sgd": [(None, None)] * 3}
    rows = [
        {"task": "gpt", "method": method, "part": part, "target_seconds": seconds, "target_step": step}
        for method, of_method in figures.items()
        for part in ("tuned", "repeated")
        for seconds, step in of_method
    ]
    (folder / "result.json").write_text(json.dumps({"rows": rows}))

    text = page([Result(folder)])

    assert "same number of trials (3)" in text
    assert "| small GPT, tinyshakespeare, batch 64 x 64 | 3.0 (kfac) | 2.5 (muon) | 24 (kfac) | 48 (muon) |" in text
    assert text.index("small GPT") < text.index("## Steps and seconds to a target (cpu2)")


def test_the_page_of_methods_is_current() -> None:
    assert (DOCS / "methods.md").read_text() == methods_page(newest()), "run: python -m benchmarks.report"


def test_the_page_of_methods_has_what_was_found_and_each_method_of_the_registry(tmp_path: Path) -> None:
    compared, approximations = (tmp_path / f"2026-01-01_{question}_cpu2" for question in ("methods", "approximations"))
    for folder in (compared, approximations):
        folder.mkdir()
        (folder / "README.md").write_text("# Title\n\nA line of its table.\n")
    rows = [
        {"task": "gpt", "method": "eva", "part": part, "target_seconds": 2.0, "target_step": 20}
        for part in ("tuned", "repeated")
    ]
    (compared / "result.json").write_text(json.dumps({"rows": rows}))
    (compared / "conclusion.md").write_text("Eva is quick.\n")

    text = methods_page([Result(compared), Result(approximations)])

    for found in ("Eva is quick.", "| eva | 2.0 (20) |", "A line of its table.", "| `seng` |", "| `kfac` |"):
        assert found in text

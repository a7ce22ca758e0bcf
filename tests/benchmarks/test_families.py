"""Untuned settings are compared with the fewest steps of NGD's trials, family by family."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import families
from benchmarks.families import FAMILIES, measure, table
from benchmarks.methods.catalogue import DEFAULTS, recipe_of
from benchmarks.methods.protocol import SEEDS
from benchmarks.methods.tasks import TASKS
from ngd_dist.config import RECIPES
from tests.support.clusters import CLUSTERS, two_clusters


def row(family: str, method: str, part: str, step: int | None) -> dict[str, Any]:
    return {"family": family, "method": method, "part": part, "target_step": step}


def test_every_family_has_a_recipe_and_a_task() -> None:
    assert list(FAMILIES) == list(RECIPES)
    assert set(FAMILIES.values()) <= set(TASKS)


def test_recipes_and_defaults_train_without_a_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TASKS, "clusters", CLUSTERS)
    monkeypatch.setattr(families, "TRIALS", 2)
    monkeypatch.setitem(families.FAMILIES, "cnn", "clusters")

    rows = measure("cnn", two_clusters(), tmp_path)

    untuned = [row for row in rows if row["part"] == "untuned"]
    assert sorted((row["method"], row["seed"]) for row in untuned) == sorted(
        (method, seed) for method in (DEFAULTS, recipe_of("cnn")) for seed in SEEDS
    )
    assert all(row["ending"] in ("reached", "ran out") for row in untuned)
    assert {row["method"] for row in rows if row["part"] == "tuned"} == set(families.TUNED)


def test_the_table_divides_by_the_fewest_steps_of_all_trials() -> None:
    rows = [row("mlp", "kfac", "tuned", step) for step in (40, None, 20)]
    rows += [row("mlp", DEFAULTS, "untuned", step) for step in (30, 25, None)]
    rows += [row("mlp", recipe_of("mlp"), "untuned", None) for _ in range(3)]

    assert "| 20 | 30 (30, 25, -) | 1.50 | - (-, -, -) | - |" in table(rows)

"""Methods are searched alike; runs stop at their targets and are kept; tables tell who got there and who did not."""

import json
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.methods import protocol
from benchmarks.methods.catalogue import METHODS, Method
from benchmarks.methods.page import table
from benchmarks.methods.protocol import measure, order, rank
from benchmarks.methods.run import Run, outcome_of
from benchmarks.methods.search import Point, Range, around, draw, is_outside, propose
from benchmarks.methods.tasks import TASKS, Data
from tests.support.clusters import CLUSTERS, two_clusters

TRIALS = 6
OURS = [name for name, method in METHODS.items() if method.is_ours and method.space]
CHECK = {"lr": 0.5, "damping": 0.1, "fraction": 0.5, "interval": 2.0, "steps": 60.0}


def row(method: str, part: str, step: int | None, seconds: float = 1.0, score: float = 0.9) -> dict[str, Any]:
    return {
        "task": "digits-mlp", "method": method, "setting": f"of {method}", "seed": 0, "part": part, "outside": [],
        "target_step": step, "target_seconds": step and seconds, "ending": "ran out",
        "steps": 99, "ms_per_step": 1.0, "curve": [{"step": 99, "score": score}],
    }  # fmt: skip


def test_points_are_spread_over_a_space_and_then_around_the_best() -> None:
    space = {"lr": Range(0.01, 1.0), "damping": Range(0.1, 1.0)}

    points = draw(space, 16, seed=0)
    rates = sorted(math.log10(point["lr"]) for point in points)

    assert all(-2 + index / 8 <= rate <= -2 + (index + 1) / 8 for index, rate in enumerate(rates))  # one in each part
    assert draw(space, 16, seed=0) == points
    near = around(space, {"lr": 0.01, "damping": 0.2})
    assert near["lr"].at(0.0) == pytest.approx(0.01 * 100 ** (-1 / 6))  # beyond the range that was first drawn from
    beyond, within = ({"lr": lr, "damping": 0.2} for lr in (0.009, 0.01))
    assert (is_outside(space, beyond), is_outside(space, within)) == (["lr"], [])


def test_trials_alternate_between_the_whole_space_and_the_best_and_go_on_where_they_stopped() -> None:
    space, best = {"lr": Range(0.01, 1.0)}, {"lr": 0.3}
    points: list[Point] = []

    for _ in range(7):
        points.append(propose(space, points, best if points else None))

    wide, near = draw(space, 4, seed=0), draw(around(space, best), 3, seed=1)
    assert points == [wide[0], wide[1], near[0], wide[2], near[1], wide[3], near[2]]


@pytest.mark.parametrize("method", ["kfac", "kfac-adaptive"])
def test_a_run_stops_at_its_target_and_is_kept(method: str, tmp_path: Path) -> None:
    run = Run("clusters", method, CHECK, 0)

    outcome = outcome_of(run, CLUSTERS, two_clusters(), tmp_path)
    (kept,) = tmp_path.glob("*.json")
    kept.write_text(kept.read_text().replace('"reached"', '"read from disk"'))

    assert outcome["ending"] == "reached"
    assert outcome["steps"] == outcome["target_step"] < 60
    assert [point["step"] for point in outcome["curve"]] == list(
        range(CLUSTERS.every, outcome["steps"] + 1, CLUSTERS.every)
    )
    assert outcome_of(run, CLUSTERS, two_clusters(), tmp_path)["ending"] == "read from disk"


@pytest.mark.parametrize(
    ("lr", "seconds", "ending", "steps"),
    [(1e-9, 10, "ran out", 5), (math.inf, 10, "diverged", 3), (1e-9, 0, "took too long", CLUSTERS.every)],
)
def test_a_run_that_never_gets_there_says_so(
    lr: float, seconds: float, ending: str, steps: int, tmp_path: Path
) -> None:
    run = Run("clusters", "sgd", {"lr": lr, "steps": 5.0}, 0)

    outcome = outcome_of(run, replace(CLUSTERS, seconds=seconds), two_clusters(), tmp_path)

    assert (outcome["ending"], outcome["target_step"]) == (ending, None)
    assert outcome["steps"] <= steps


def test_the_rate_rises_over_a_tenth_of_the_steps_and_would_be_zero_after_the_last() -> None:
    run = Run("clusters", "sgd", {"lr": 1.0, "steps": 20.0}, 0)

    assert [run.lr_factor(step) for step in (1, 2, 11, 21)] == pytest.approx([0.5, 0.95, 0.5, 0.0])


def test_fewest_seconds_win_and_then_the_closest_score() -> None:
    slow, quick = row("kfac", "tuned", 4, seconds=2.0), row("kfac", "tuned", 8, seconds=1.0)
    never, nearly = row("kfac", "tuned", None, score=0.5), row("kfac", "tuned", None, score=0.2)

    assert order([never, slow, quick], CLUSTERS) == [2, 1, 0]
    assert order([never, nearly], CLUSTERS) == [1, 0]
    assert order([never, nearly], replace(CLUSTERS, measure="test accuracy")) == [0, 1]


def test_each_method_gets_as_many_trials_and_its_best_is_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(TASKS, "clusters", CLUSTERS)
    small = Method(METHODS["sgd"].build, {"lr": Range(0.001, 1.0)})
    monkeypatch.setitem(METHODS, "sgd", small)

    rows = measure("clusters", ["sgd", "adamw"], two_clusters(), tmp_path, TRIALS)

    for method in ("sgd", "adamw"):
        tuned = [row for row in rows if (row["method"], row["part"]) == (method, "tuned")]
        repeated = [row for row in rows if (row["method"], row["part"]) == (method, "repeated")]
        assert [row["seed"] for row in tuned] == TRIALS * [0] + protocol.FINALISTS * [4]
        worse = {
            row["setting"]: max(
                rank(row, CLUSTERS), *(rank(r, CLUSTERS) for r in tuned[:TRIALS] if r["setting"] == row["setting"])
            )
            for row in tuned[TRIALS:]
        }
        assert {row["setting"] for row in repeated} == {min(worse, key=worse.__getitem__)}
        assert [row["seed"] for row in repeated] == list(protocol.SEEDS)
        paces = [json.loads(path.read_text())["ms"] for path in tmp_path.glob(f"clusters-{method}-*-pace?.json")]
        assert len(paces) == protocol.ROUNDS
        for row in repeated:
            assert row["ms_per_step"] == statistics.median(paces) > 0
            assert row["target_step"] is None or row["target_seconds"] == row["target_step"] * row["ms_per_step"] / 1000


def test_the_table_compares_medians_with_the_best_rival_and_keeps_losers() -> None:
    rows = [row("kfac", "repeated", step, seconds=float(step)) for step in (20, 30, 40)]
    rows += [row("lamb", "repeated", step, seconds=15.0) for step in (50, 60, None)]
    rows += [row("sgd", "repeated", None), row("sgd", "tuned", None), row("soap", "tuned", 48)]

    text = table(rows)

    assert "| kfac | 30.00 (20.00, 30.00, 40.00) | 30 (20, 30, 40) |" in text
    assert "| lamb | 15.00 (15.00, 15.00, -) | 60 (50, 60, -) |" in text
    assert "| sgd | - (-) | - (-) |" in text
    assert "The best of ours over the best rival's: seconds 2.00, steps 0.50." in text
    assert "| sgd | 0 | of sgd | - | - | 0.9 | ran out after 99 |" in text
    assert "| soap | 0 | of soap | 1.0 | 48 |" in text
    assert "training loss 0.001. 1 trials of each method." in text
    assert "| kfac | 30.0 (30) |" in text
    assert "| sgd | *0.9* |" in text


@pytest.mark.parametrize("method", OURS)
def test_our_settings_are_valid_over_the_whole_space(method: str) -> None:
    for point in draw(METHODS[method].space, 16, seed=0):
        METHODS[method].build(nn.Linear(4, 2), point)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "resnet20" else ()) for name in TASKS]
)
def test_the_model_of_a_task_begins_where_chance_does(name: str) -> None:
    task = TASKS[name]
    given = os.environ.get("NGD_DATA_DIR")
    if given is None and name != "digits-mlp":
        pytest.skip("the data sets are looked for in NGD_DATA_DIR, which is not set")
    data = task.load(Path(given or "."))
    some_train, some_test = (slice(None, None, max(1, len(x) // 500)) for x in (data.train_x, data.test_x))
    few = Data(data.train_x[some_train], data.train_y[some_train], data.test_x[some_test], data.test_y[some_test])
    classes = int(data.train_y.max()) + 1
    torch.manual_seed(0)

    score = task.score(task.model(), few)

    chance = 1 / classes if task.measure == "test accuracy" else math.log(classes)
    assert score == pytest.approx(chance, rel=1.0 if task.measure == "test accuracy" else 0.1)
    assert not task.is_reached(score)

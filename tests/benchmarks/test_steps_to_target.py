"""Runs stop at their targets and are kept; tables tell who got there, and who did not."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import steps_to_target
from benchmarks.target_methods import FIRST_ORDER, Setting
from benchmarks.target_run import Run, outcome_of
from benchmarks.target_settings import EXPLORED, SETTINGS, adaptive
from benchmarks.target_tasks import Data, Task
from ngd_dist import NGDConfig

BATCH, EVERY = 32, 2


def two_clusters() -> Data:
    y = torch.arange(64) % 2
    x = torch.nn.functional.one_hot(y, 4).float()
    return Data(x, y, x, y)


def task(accuracy: float = 1.0, loss: float = 0.1) -> Task:
    return Task(lambda _: two_clusters(), lambda: nn.Linear(4, 2), accuracy, loss, {BATCH: EVERY})


def row(method: str, part: str, step: int | None, seconds: float = 1.0, accuracy: float = 0.9) -> dict[str, Any]:
    return {
        "method": method, "setting": f"of {method}", "batch": BATCH, "seed": 0, "part": part, "ending": "ran out",
        "accuracy_step": step, "accuracy_seconds": step and seconds, "loss_step": step, "loss_seconds": None,
        "steps": 99, "ms_per_step": 1.0, "curve": [{"step": 99, "accuracy": accuracy}],
    }  # fmt: skip


@pytest.mark.parametrize("options", [{"lr": 0.5}, adaptive(0.1, 0.9)], ids=["given", "adaptive"])
def test_a_run_stops_at_its_targets_and_is_kept(options: dict[str, Any], tmp_path: Path) -> None:
    run = Run("clusters", BATCH, "ngd", Setting(60, 0, options), 0, stops=True)

    outcome = outcome_of(run, task(), two_clusters(), tmp_path)
    (kept,) = tmp_path.glob("*.json")
    kept.write_text(kept.read_text().replace('"reached"', '"read from disk"'))

    assert outcome["ending"] == "reached"
    assert outcome["steps"] == max(outcome["accuracy_step"], outcome["loss_step"]) < 60
    assert [point["step"] for point in outcome["curve"]] == list(range(EVERY, outcome["steps"] + 1, EVERY))
    assert outcome_of(run, task(), two_clusters(), tmp_path)["ending"] == "read from disk"


@pytest.mark.parametrize(
    ("setting", "ending", "steps"),
    [(Setting(5, 0, {"lr": 1e-9}), "ran out", 5), (Setting(9, 0, {"lr": math.inf}), "diverged", 3)],
)
def test_a_run_that_never_gets_there_says_so(setting: Setting, ending: str, steps: int, tmp_path: Path) -> None:
    outcome = outcome_of(Run("clusters", BATCH, "sgd", setting, 0, True), task(loss=0.0), two_clusters(), tmp_path)

    assert (outcome["ending"], outcome["loss_step"]) == (ending, None)
    assert outcome["steps"] <= steps


def test_the_rate_rises_over_the_warm_up_and_would_be_zero_after_the_last_step() -> None:
    setting = Setting(steps=10, warmup=2)

    assert [setting.lr_factor(step) for step in (1, 2, 6, 11)] == pytest.approx([0.5, 0.9, 0.5, 0.0])


def test_fewest_steps_win_then_seconds_then_accuracy() -> None:
    quick, slow = row("ngd", "tuned", 4, seconds=1.0), row("ngd", "tuned", 4, seconds=2.0, accuracy=0.99)
    never, nearly = row("ngd", "tuned", None, accuracy=0.5), row("ngd", "tuned", None, accuracy=0.8)

    assert steps_to_target.best_of([never, slow, quick]) is quick
    assert steps_to_target.best_of([never, nearly]) is nearly


def test_the_table_compares_medians_with_the_best_first_order_method_and_keeps_losers() -> None:
    rows = [row("ngd", "repeated", step) for step in (20, 30, 40)]
    rows += [row("lamb", "repeated", step) for step in (50, 60, None)]
    rows += [row("sgd", "repeated", None), row("sgd", "tuned", None), row("soap", "explored", 48)]

    text = steps_to_target.table(rows, "clusters", task())

    assert "| ngd | of ngd | 30 (20, 30, 40) | 0.50 |" in text
    assert "| lamb | of lamb | 60 (50, 60, -) | 1.00 |" in text
    assert "| sgd | of sgd | - (-) | - |" in text
    assert "| sgd | of sgd | - | - | - | 0.9000 | 99 steps |" in text
    assert "| soap (explored) | of soap | 48 |" in text


@pytest.mark.parametrize("batch", SETTINGS)
def test_no_method_gets_more_than_six_settings_and_ours_are_valid(batch: int) -> None:
    assert {*FIRST_ORDER, "ngd", "muon", "soap", "singd"} == SETTINGS[batch].keys()
    assert max(map(len, SETTINGS[batch].values())) == 6
    for setting in [*SETTINGS[batch]["ngd"], *EXPLORED[batch]["ngd"]]:
        NGDConfig.model_validate(setting.options)
        assert math.isfinite(setting.lr_factor(setting.steps))

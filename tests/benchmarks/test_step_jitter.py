"""The measuring of how even steps are runs, and its arithmetic is right; how long anything takes is never asserted."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import step_jitter
from benchmarks.peers import Setting
from benchmarks.rivals import RIVALS
from benchmarks.step_jitter import Plan, Row, jitter, measure, percentile, rows, table


def test_ours_and_every_rival_get_a_row(tiny_model: str) -> None:
    found = measure(Plan(tiny_model, 6, 3, batch=16), rows({"adamw": RIVALS["adamw"]}))

    names = [(row["optimizer"], row["refresh"]) for row in found]
    assert names[0] == ("sgd", "1/1")
    assert names[-1] == ("adamw", "1/1")
    assert {("ngd", "10/10"), ("ngd", "adaptive"), ("ngd rows 128", "adaptive")} < set(names)
    assert all(row["p50"] <= row["p95"] <= row["p99"] for row in found)
    assert "| ngd * | adaptive |" in table({"rows": found, "left_out": {"asdl kfac": "not here"}})


class Ticking:
    """Adds its next cost to a clock at each step."""

    def __init__(self, clock: list[float], costs: Any) -> None:
        self.clock, self.costs = clock, iter(costs)

    def run(self, x: torch.Tensor, y: torch.Tensor) -> None:
        cost = next(self.costs)
        if cost < 0:
            raise ValueError("singular")
        self.clock[0] += cost


def rows_of(clock: list[float], *streams: list[float]) -> Row:
    costs = itertools.cycle(streams)

    def build(model: nn.Module, setting: Setting) -> Any:
        return Ticking(clock, next(costs))

    return Row("ticking", "1/1", build)


def test_a_step_counts_with_the_least_of_its_repeats() -> None:
    clock = [0.0]
    row = rows_of(clock, [9.0, 1.0, 2.0, 9.0, 1.0], [9.0, 5.0, 1.0, 2.0, 1.0])

    (found,) = measure(Plan("mlp", 4, 1, repeats=2, batch=1), [row], lambda: clock[0])

    assert found["percentiles"][0] == 1000
    assert (found["p50"], found["p99"], found["jitter"]) == (1000, 2000, 2)


def test_who_raises_is_a_row_that_says_so() -> None:
    clock = [0.0]

    (found,) = measure(Plan("mlp", 2, 0, batch=1), [rows_of(clock, [1.0, -1.0])], lambda: clock[0])

    assert found["failure"] == "ValueError: singular"
    assert "| ticking | 1/1 | fails |" in table({"rows": [found], "left_out": {}})


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(i) for i in range(100, 0, -1)]

    assert [percentile(values, q) for q in (0, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert jitter([2.0] * 98 + [6.0, 6.0]) == 3


def test_who_is_missing_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_jitter, "why_not", lambda name: "not here" if name == "adamw" else None)

    assert "adamw" not in {row.name for row in rows({"adamw": RIVALS["adamw"]})}
    assert step_jitter.run([], [])["left_out"] == {"adamw": "not here"}

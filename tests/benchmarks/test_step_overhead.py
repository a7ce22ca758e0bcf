"""The timing of steps runs, and its arithmetic is right; how long anything takes is never asserted."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import step_overhead
from benchmarks.peers import Refresh
from benchmarks.step_overhead import (
    Case,
    Plan,
    half_of_best,
    measure,
    on_cpu,
    on_cuda,
    on_two_ranks,
    table,
    target_rows,
)

NAMES = ("sgd", "ngd", "ngd rows 128", "adamw")


def row(optimizer: str, refresh: str, ratio: float | None) -> dict[str, Any]:
    return {
        "model": "mlp", "batch": 256, "ranks": 1, "optimizer": optimizer, "refresh": refresh, "ratio": ratio,
        "spread": [ratio, ratio], "ms": 1.0, "sgd_ms": 1.0, "blocks": 1, "refreshed_share": None, "loss": 1.0,
        "failure": None if ratio else "ValueError: no",
    }  # fmt: skip


def test_every_optimizer_and_refresh_gets_a_row(tiny_model: str) -> None:
    rows = on_cpu(Plan(tiny_model, 16, blocks=2, steps=1, settle=3, names=NAMES))

    assert [(r["optimizer"], r["refresh"]) for r in rows[:5]] == [
        ("sgd", "1/1"), ("ngd", "1/10"), ("ngd", "1/1"), ("ngd", "10/10"), ("ngd", "adaptive"),
    ]  # fmt: skip
    assert all(r["ratio"] > 0 and r["blocks"] == 2 and r["loss"] for r in rows)
    assert next(r for r in rows if r["refresh"] == "10/10")["refreshed_share"] == pytest.approx(0.1)


class Ticking:
    """Adds its cost to a clock at each step."""

    def __init__(self, clock: list[float], name: str, cost: float) -> None:
        self.clock, self.name, self.cost = clock, name, cost

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        if self.cost < 0:
            raise ValueError("singular")
        self.clock[0] += self.cost
        return x.sum()


def test_ratio_is_to_the_blocks_of_sgd_around_and_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, costs = [0.0], {"sgd": 2.0, "adamw": 5.0, "pytorch_optimizer lamb": -1.0}
    monkeypatch.setattr(step_overhead, "why_not", lambda name: None)
    stream: Iterator[tuple[Tensor, Tensor]] = itertools.repeat((torch.ones(1), torch.ones(1)))

    def make(name: str, refresh: Refresh) -> Case:
        trainer: Any = Ticking(clock, name, costs[name])
        return Case(trainer, refresh, stream)

    rows = measure(Plan("mlp", 1, 2, 3, 1, names=tuple(costs)), lambda: clock[0], make)

    assert [r["ratio"] for r in rows] == [1.0, 2.5, None]
    assert rows[2]["failure"] == "ValueError: singular"


def test_bound_is_half_the_overhead_of_the_best_dense_rival() -> None:
    rows = [row("asdl kfac", "1/1", 6.0), row("kfac-pytorch eigen", "1/1", 9.0), row("singd diagonal", "1/1", 1.2)]
    rows += [row("ngd", "1/1", 3.0), row("curvlinops kfac", "1/1", None)]

    assert half_of_best(rows, "mlp", "1/1") == 3.5
    assert target_rows(rows) == [
        {"model": "mlp", "refresh": "1/1", "at_most": 2.5, "half_of_best": 3.5, "ours": {"ngd": 3.0}}
    ]
    text = table({"rows": rows, "targets": target_rows(rows), "left_out": {"asdl kfac 1mc": "not here"}})
    assert "| mlp | 1/1 | 2.5 | 3.50 | ngd 3.00 |" in text
    assert "| curvlinops kfac | 1/1 | fails | | | | ValueError: no |" in text


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_give_one_row_each_optimizer() -> None:
    rows = on_two_ranks(Plan("mlp", 8, blocks=1, steps=1, settle=1, names=("sgd", "ngd")))

    assert [(r["ranks"], r["optimizer"], r["refresh"]) for r in rows] == [
        (2, "sgd", "1/1"), (2, "ngd", "1/10"), (2, "ngd", "1/1"), (2, "ngd", "10/10"), (2, "ngd", "adaptive"),
    ]  # fmt: skip


def test_the_gpu_path_trains_in_bfloat16_channels_last(tiny_model: str) -> None:
    rows = on_cuda(Plan(tiny_model, 8, blocks=1, steps=1, settle=1, names=("sgd", "ngd")), device="cpu")

    assert all(r["loss"] is not None for r in rows)


def test_sampling_is_judged_by_steps_to_the_same_loss(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_overhead.TARGET_LOSS, tiny_model, 100.0)
    assert step_overhead.steps_to_loss("ngd", tiny_model, "10/10", 0.03, seed=0) == 3

    monkeypatch.setitem(step_overhead.TARGET_LOSS, tiny_model, 0.0)
    assert step_overhead.steps_to_loss("ngd", tiny_model, "10/10", 0.03, seed=0, limit=4) is None

"""K-FAC with factors kept as rows: exact where all rows are kept, unbiased where some are drawn."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.errors import ConfigError
from ngd_dist.factors.kronecker import sampled
from ngd_dist.factors.root import Root
from ngd_dist.inversion import Ending, invert, invert_rows
from ngd_dist.statistics.statistic import Statistic, StatisticSpec
from tests.support.ranks import run_ranks
from tests.support.tensors import F64


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)).double()


def train(rows: int | None, *, rank: int = 0, world_size: int = 1, micro_batches: int = 1, **more: Any) -> list[Tensor]:
    """Returns the weights after three steps of 8 samples: fewer than the first layer's inputs and outputs."""
    model = build_model()
    settings: dict[str, Any] = {"preconditioner": {"kind": "kfac", "rows": rows}, "staleness": {"kind": "fixed"}} | more
    optimizer = NGD(model, NGDConfig(lr=0.05, micro_batches=micro_batches, **settings))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 30, dtype=F64, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        own_x, own_y = x.chunk(world_size)[rank], y.chunk(world_size)[rank]
        for part_x, part_y in zip(own_x.chunk(micro_batches), own_y.chunk(micro_batches), strict=True):
            (F.cross_entropy(model(part_x), part_y) / micro_batches).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_keeping_every_row_gives_the_weights_of_matrices() -> None:
    for rows, matrices in zip(train(8), train(None), strict=True):
        torch.testing.assert_close(rows, matrices, rtol=1e-10, atol=1e-12)


def test_a_batch_smaller_than_the_rows_is_exact() -> None:
    for rows, matrices in zip(train(10), train(None), strict=True):
        torch.testing.assert_close(rows, matrices, rtol=1e-10, atol=1e-12)


def test_micro_batches_put_their_rows_side_by_side() -> None:
    for rows, matrices in zip(train(8, micro_batches=2), train(None), strict=True):
        torch.testing.assert_close(rows, matrices, rtol=1e-10, atol=1e-12)


def train_on_rank(rank: int, world_size: int, strategy: str) -> list[Tensor]:
    return train(8, rank=rank, world_size=world_size, strategy={"kind": strategy})


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["all_reduce", "owner_sharded"])
def test_ranks_put_their_rows_side_by_side(strategy: str) -> None:
    for weights in run_ranks(2, train_on_rank, strategy):
        for rows, matrices in zip(weights, train(None), strict=True):
            torch.testing.assert_close(rows, matrices, rtol=1e-10, atol=1e-12)


def test_drawn_rows_have_the_whole_factor_for_their_mean() -> None:
    rows = torch.randn(1, 12, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    draws = 4000

    drawn = torch.stack([sampled(rows, 3, seed) for seed in range(draws)])
    factors = drawn.mT @ drawn
    error = factors.mean(0) - rows.mT @ rows

    # Five standard errors of the mean, entry by entry.
    assert bool((error.abs() < 5 * factors.std(0) / draws**0.5).all())
    assert drawn.shape == (draws, 1, 3, 4)


def test_a_run_with_fewer_rows_repeats_itself() -> None:
    for first, second in zip(train(2), train(2), strict=True):
        assert torch.equal(first, second)
    assert not torch.allclose(train(2)[0], train(None)[0])


def test_woodbury_is_the_dense_inverse() -> None:
    rows = torch.randn(2, 3, 7, dtype=F64, generator=torch.Generator().manual_seed(2))
    damping = torch.tensor([0.1, 2.0], dtype=F64)

    found, dense = invert_rows(rows, damping), invert(rows.mT @ rows, damping)

    assert found.value is not None
    assert dense.value is not None
    inverse = (torch.eye(7, dtype=F64) - found.value.mT @ found.value) / damping.view(-1, 1, 1)
    torch.testing.assert_close(inverse, dense.value, rtol=1e-12, atol=1e-12)
    assert found.residual < 1e-12


@pytest.mark.parametrize(
    ("rows", "damping", "ending"),
    [(float("nan"), 1.0, Ending.NON_FINITE), (0.0, 0.0, Ending.NOT_POSITIVE_DEFINITE)],
)
def test_rows_that_have_no_inverse_say_why(rows: float, damping: float, ending: Ending) -> None:
    found = invert_rows(torch.full((1, 2, 5), rows, dtype=F64), torch.tensor([damping], dtype=F64))

    assert found.value is None
    assert found.ending is ending


def test_the_change_of_rows_is_that_of_their_factor() -> None:
    first, second = torch.randn(2, 1, 4, 9, dtype=F64, generator=torch.Generator().manual_seed(3)).unbind(0)
    statistic = Statistic(StatisticSpec("A", Root((1, 4, 9))), ema_decay=0.0, remembers=True)
    statistic.fold(first)

    change = statistic.fold(second)

    A, B = first.mT @ first, second.mT @ second
    expected = torch.linalg.vector_norm(B - A) / torch.linalg.vector_norm(A)
    assert change.to_last == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"preconditioner": {"kind": "kfac", "rows": 8, "damping_form": "exact"}},
        {"preconditioner": {"kind": "kfac", "rows": 8}, "ema_decay": 0.9},
        {"preconditioner": {"kind": "kfac", "rows": 8}, "fisher": {"kind": "exact"}},
        {"preconditioner": {"kind": "kfac", "rows": 8}, "fisher": {"kind": "monte_carlo", "samples": 2}},
    ],
)
def test_settings_that_rows_contradict_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leave"):
        NGDConfig.model_validate(settings)


def test_too_few_rows_for_the_micro_batches_are_refused() -> None:
    config = NGDConfig.model_validate(
        {"preconditioner": {"kind": "kfac", "rows": 3}, "micro_batches": 4, "staleness": FixedInterval()}
    )

    with pytest.raises(ConfigError, match="at least 4"):
        NGD(build_model(), config)

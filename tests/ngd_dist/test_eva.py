"""Eva equals its dense formula in float64: a rank-one block from mean inputs and mean gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import Eva, FixedInterval
from ngd_dist.factors.cost import LayerShape
from ngd_dist.preconditioners import Preconditioner, preconditioner_for
from ngd_dist.statistics.statistic import Key
from tests.support.refreshing import refresh
from tests.support.rows import random_rows
from tests.support.slopes import two_layers
from tests.support.tensors import F64

BOTH = frozenset({"a", "g"})
SHAPE = (2, 4, 5)


def method_of(sharing: str = "expand") -> Preconditioner:
    B, O, I = SHAPE  # noqa: E741
    config = NGDConfig.model_validate({"preconditioner": {"kind": "eva", "sharing": sharing}})
    return preconditioner_for(LayerShape("layer", "kronecker", I, O, blocks=B), config)


def solved(grad_OI: Tensor, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """Returns the dense solution with the block of rank one plus damping I."""
    vector = torch.kron(g, a)
    block = torch.outer(vector, vector) + damping * torch.eye(len(vector), dtype=vector.dtype)
    return torch.linalg.solve(block, grad_OI.flatten()).view_as(grad_OI)


@pytest.mark.parametrize(("sharing", "scale"), [("expand", 3**0.5), ("reduce", 3.0)])
def test_statistics_are_means_in_the_scale_of_kfacs_factors(sharing: str, scale: float) -> None:
    method, rows = method_of(sharing), random_rows(SHAPE, samples=7, positions=3)

    found = method.estimate(rows, BOTH, {})

    mean_a, mean_g = rows.a_BNPI.mean((1, 2)), rows.g_BNPO.mean((1, 2))
    ours = torch.einsum("bo,bi->boi", found["g"], found["a"])
    torch.testing.assert_close(ours, scale * torch.einsum("bo,bi->boi", mean_g, mean_a), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_direction_is_the_dense_solve(positions: int, damping: float) -> None:
    method, rows = method_of(), random_rows(SHAPE, samples=7, positions=positions)
    statistics = method.estimate(rows, BOTH, {})
    grad = torch.randn(SHAPE, dtype=F64, generator=torch.Generator().manual_seed(1))

    cache = refresh(method, statistics, BOTH, damping, None).cache

    assert cache is not None
    for b in range(2):
        exact = solved(grad[b], statistics["a"][b], statistics["g"][b], damping)
        torch.testing.assert_close(method.apply(cache, grad)[b], exact, rtol=1e-10, atol=1e-10)


def test_the_block_of_one_sample_is_its_fisher() -> None:
    model, x, y = two_layers()
    optimizer = NGD(model, NGDConfig(preconditioner=Eva(), momentum=0.0, damping=0.1, lr=1.0))
    before = model[0].weight.detach().clone()

    F.cross_entropy(model(x[:1]), y[:1]).backward()
    grad = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], dim=1)
    optimizer.step()

    block = torch.outer(grad.flatten(), grad.flatten()) + 0.1 * torch.eye(grad.numel(), dtype=F64)
    exact = torch.linalg.solve(block, grad.flatten()).view_as(grad)[:, :-1]
    torch.testing.assert_close(before - model[0].weight.detach(), exact, rtol=1e-10, atol=1e-12)


def measured(model: nn.Module, config: dict[str, Any], parts: list[tuple[Tensor, Tensor]], total: int) -> list[Tensor]:
    """Returns the statistics of the first layer after a step in which each part's sum of losses is over `total`."""
    optimizer = NGD(model, NGDConfig(preconditioner=Eva(), staleness=FixedInterval(), **config))
    for x, y in parts:
        F.cross_entropy(model(x), y, reduction="sum").div(total).backward()
    optimizer.step()
    statistics = [optimizer._curvature.statistics[Key("0", name)].value for name in ("a", "g")]
    return [value for value in statistics if value is not None]


@pytest.mark.parametrize("micro_batches", [2, "any"])
def test_micro_batches_have_the_vectors_of_the_whole(micro_batches: Any) -> None:
    model, x, y = two_layers()
    whole = measured(model, {}, [(x, y)], 8)
    model, x, y = two_layers()

    parts = measured(model, {"micro_batches": micro_batches}, [(x[:4], y[:4]), (x[4:], y[4:])], 8)

    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_sampled_fisher_is_refused() -> None:
    with pytest.raises(ValueError, match="leave out fisher monte_carlo"):
        NGDConfig.model_validate({"preconditioner": {"kind": "eva"}, "fisher": {"kind": "monte_carlo"}})


@pytest.mark.parametrize("setting", [{"inversion": {"kind": "cholesky"}}, {"inverse_dtype": "bfloat16"}])
def test_settings_of_inversion_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="preconditioner eva inverts no factor"):
        NGDConfig.model_validate({"preconditioner": {"kind": "eva"}, **setting})

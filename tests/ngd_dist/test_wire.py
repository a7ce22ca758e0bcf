"""What a statistic is after it crossed the network, and what that does to a direction."""

import pytest
import torch
from torch import Tensor

from ngd_dist.distributed.packed_bytes import pack_bytes, unpack_bytes
from ngd_dist.distributed.wire import Wire
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.factors.form import Entrywise
from ngd_dist.statistics.statistic import Key, StatisticSpec

KEY = Key("layer", "X")
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Of the float32 operations of encoding and decoding: two roots, four products.
FLOAT32 = 6 * 2.0**-24


def crossed(spec: StatisticSpec, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the value as another rank has it."""
    wire = Wire({KEY: spec.form.on_wire(torch.float32, dtype)})
    fields, tensors = wire.fields([KEY]), wire.encode({KEY: spec.form.flatten(value)})
    packed = pack_bytes([*fields.values()], [tensors[item] for item in fields], value.device)
    arrived = dict(zip(fields, unpack_bytes([*fields.values()], packed), strict=True))
    return spec.form.expand(wire.decode(KEY, arrived))


def second_moment(n: int, spread: float, blocks: int = 1) -> Tensor:
    """Returns a second moment whose diagonal spans the square of 10 ** spread."""
    rows = torch.randn(blocks, 3 * n, n, generator=torch.Generator().manual_seed(n))
    rows = rows * torch.logspace(0, -spread, n)
    return rows.mT @ rows / (3 * n)


def matrix(n: int, blocks: int = 1) -> StatisticSpec:
    return StatisticSpec("X", Dense((blocks, n, n)))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_each_entry_is_within_the_rounding_of_its_dtype(dtype: torch.dtype, scale: float) -> None:
    X = scale * second_moment(20, spread=3, blocks=2)

    Y = crossed(matrix(20, 2), X, dtype)

    roots = X.diagonal(dim1=-2, dim2=-1).sqrt()
    least = 2.0**-25 if dtype == torch.float16 else 0.0  # half of float16's smallest step, in units of the roots
    bound = (ROUNDING[dtype] + FLOAT32) * X.abs() + least * roots.unsqueeze(-1) * roots.unsqueeze(-2)
    assert bool(((X - Y).abs() <= bound).all())
    assert torch.equal(X.diagonal(dim1=-2, dim2=-1), Y.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(Y, Y.mT)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_direction_is_off_by_no_more_than_its_conditioning_makes_of_the_rounding(dtype: torch.dtype) -> None:
    X, damping = second_moment(40, spread=1)[0].double(), 1e-2
    Y = crossed(matrix(40), X.float().unsqueeze(0), dtype)[0].double()
    gradient = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    damped, rounded = (M + damping * torch.eye(40, dtype=torch.float64) for M in (X, Y))

    exact, ours = torch.linalg.solve(damped, gradient), torch.linalg.solve(rounded, gradient)

    # |(X + E)^-1 g - X^-1 g| <= |X^-1| |E| |(X + E)^-1 g|, and the spectral norm of E is at most its Frobenius norm:
    # u |X|_F of rounding, and what float16 loses of its smallest entries.
    loss = (2.0**-25 * torch.trace(X) if dtype == torch.float16 else 0.0) + 2 * FLOAT32 * torch.linalg.norm(X)
    error = ROUNDING[dtype] * torch.linalg.norm(X) + loss
    inverse = 1 / torch.linalg.eigvalsh(damped).min()
    assert torch.linalg.norm(ours - exact) <= inverse * error * torch.linalg.norm(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [1e-30, 1.0, 3e9])
def test_a_value_per_gradient_entry_keeps_its_relative_rounding(dtype: torch.dtype, largest: float) -> None:
    S = largest * torch.rand(1, 6, 7, generator=torch.Generator().manual_seed(0)).square()

    error = (crossed(StatisticSpec("X", Entrywise((1, 6, 7))), S, dtype) - S).abs()

    # 2^-39 of the largest is half of float16's smallest step where the largest is at least 2^13.
    assert bool((error <= (ROUNDING[dtype] + FLOAT32) * S + 2.0**-38 * S.max()).all())


@pytest.mark.parametrize("dtype", ROUNDING)
def test_vectors_of_second_moments_cross_whole(dtype: torch.dtype) -> None:
    spec, diagonal = StatisticSpec("X", Diagonal((1, 50))), torch.logspace(-30, 30, 50)

    assert torch.equal(crossed(spec, diagonal.unsqueeze(0), dtype), diagonal.unsqueeze(0))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("spec", [matrix(4), StatisticSpec("X", Entrywise((1, 4, 4)))])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(dtype: torch.dtype, spec: StatisticSpec) -> None:
    dead = second_moment(4, spread=0)
    dead[:, 1], dead[:, :, 1] = 0.0, 0.0

    assert torch.equal(crossed(spec, torch.zeros(1, 4, 4), dtype), torch.zeros(1, 4, 4))
    assert bool((crossed(spec, dead, dtype)[:, 1] == 0).all())
    for bad in (float("nan"), float("inf")):
        for place in ((0, 1), (2, 2)):
            broken = second_moment(4, spread=0)
            broken[:, place[0], place[1]] = broken[:, place[1], place[0]] = bad
            assert not bool(torch.isfinite(crossed(spec, broken, dtype)).all())

"""Inverses in 16 bits: what rounding costs a direction, and that nothing else changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.factors.caches import Caches
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.factors.storage import InverseDtype, store
from ngd_dist.inversion import Inverse, ToInvert, solve
from tests.reference.inverses import spd
from tests.support.training import train

DTYPES = [torch.float16, torch.bfloat16]
UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def inverse_of(kappa: float) -> tuple[Tensor, Tensor]:
    """Returns a matrix and its inverse, [1, n, n], in float64."""
    matrix = spd(kappa).unsqueeze(0)
    return matrix, torch.linalg.inv(matrix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", [1e2, 1e3, 1e6])
def test_entries_are_rounded_and_their_range_is_kept(dtype: torch.dtype, kappa: float) -> None:
    rows = torch.logspace(-6, 6, 256, dtype=torch.float64)
    exact = inverse_of(kappa)[1].float() * (rows * rows[:, None]).float()

    stored = store(exact, dtype)

    error = (stored.load() - exact).abs()
    largest = exact.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1) * exact.diagonal(dim1=-2, dim2=-1).sqrt()[:, None]
    assert bool((error <= UNIT_ROUNDOFF[dtype] * exact.abs() + 2.0**-23 * largest).all())
    assert stored.value.element_size() == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_storing_again_changes_nothing(dtype: torch.dtype) -> None:
    once = store(inverse_of(1e3)[1].float(), dtype).load()

    assert torch.equal(store(once, dtype).load(), once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", [1e2, 1e3])
def test_a_direction_keeps_the_bits_that_its_dtype_has(dtype: torch.dtype, kappa: float) -> None:
    _, exact = inverse_of(kappa)
    gradient = torch.randn(1, 256, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    direction = store(exact, dtype).load() @ gradient

    error = torch.linalg.norm(direction - exact @ gradient) / torch.linalg.norm(exact @ gradient)
    assert float(error) < UNIT_ROUNDOFF[dtype]  # rounding errors of a row's terms are of either sign


def test_one_refinement_repairs_what_float16_lost() -> None:
    matrix, exact = inverse_of(1e3)
    generator = torch.Generator().manual_seed(0)
    gradient = matrix @ torch.randn(1, 256, 64, dtype=torch.float64, generator=generator)  # rounding shows most here
    solved = solve({"": ToInvert(matrix.float(), torch.zeros(1))})[""]
    assert isinstance(solved, Inverse)
    assert solved.value is not None
    inverse = store(solved.value, torch.float16).load().double()

    direction, errors = inverse @ gradient, []
    for _ in range(3):
        errors.append(float(torch.linalg.norm(direction - exact @ gradient) / torch.linalg.norm(exact @ gradient)))
        direction = direction + inverse @ (gradient - matrix @ direction)

    assert errors[0] > 1e-3
    assert errors[1] < 1e-3
    assert errors[2] < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_inverses_are_rounded(dtype: InverseDtype) -> None:
    exact, other = inverse_of(1e2)[1].float(), torch.rand(1, 256)
    caches = Caches({"fc": {"A": Dense((1, 256, 256)), "G": Diagonal((1, 256))}, "unused": {}}, dtype)

    caches["fc"] = {"A": exact, "G": other}

    found = caches["fc"]
    assert found is not None
    assert torch.equal(found["A"], exact) == (dtype == "float32")
    assert found["A"].dtype == torch.float32
    assert torch.equal(found["G"], other)
    assert [caches.has(name) for name in caches] == [True, False]
    assert caches["unused"] is None


def trained(inverse_dtype: str, steps: int = 8, **settings: Any) -> tuple[nn.Module, NGD, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    config = {"inverse_dtype": inverse_dtype, "damping": 0.1, "staleness": FixedInterval(steps=3)} | settings
    optimizer = NGD(model, NGDConfig.model_validate(config))
    return model, optimizer, steps_of(model, optimizer, steps)


def steps_of(model: nn.Module, optimizer: NGD, steps: int) -> list[float]:
    x, y = torch.randn(64, 12, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5
    return train(optimizer, model, x, y, steps)


@pytest.mark.parametrize("kind", ["kfac", "lngd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_training_is_that_of_float32_but_for_rounding(dtype: str, tolerance: float, kind: str) -> None:
    method = {"preconditioner": {"kind": kind}, "lr": 0.01}
    _, _, exact = trained("float32", **method)
    _, _, rounded = trained(dtype, **method)

    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_goes_on_bit_for_bit_from_its_state(dtype: str) -> None:
    model, optimizer, _ = trained(dtype, steps=4)
    twin, other, _ = trained(dtype, steps=0)
    twin.load_state_dict(model.state_dict())

    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert steps_of(twin, other, 4) == steps_of(model, optimizer, 4)


def test_newton_schulz_starts_from_an_inverse_in_16_bits() -> None:
    newton = {"kind": "newton_schulz"}
    _, _, exact = trained("float32", ema_decay=0.9)
    _, optimizer, found = trained("float16", ema_decay=0.9, inversion=newton)

    assert optimizer.stats.failed_inversions == 0
    assert found == pytest.approx(exact, rel=2e-3)

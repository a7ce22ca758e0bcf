"""Mixed precision: statistics in full precision, loss scales undone, steps that overflow given up as a whole."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, AdamWFallback, FixedInterval, MonteCarlo
from ngd_dist.errors import ConfigError, NonFiniteError
from tests.support.ranks import run_ranks
from tests.support.tensors import captured, weights

SCALE = 1024.0  # a power of 2: scaling by it is exact
EVERY_STEP = FixedInterval()


def model_and_batch() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 4))
    return model, torch.randn(8, 1, 4, 4), torch.randint(4, (8,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_statistics_by_its_own_rounding_alone(dtype: torch.dtype) -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model)
    F.cross_entropy(model(x), y).backward()
    full = captured(optimizer)
    optimizer = NGD(model)

    with torch.autocast("cpu", dtype=dtype):
        F.cross_entropy(model(x), y).backward()

    for name, value in captured(optimizer).items():
        assert value.dtype == torch.float32
        change = torch.linalg.vector_norm(value - full[name]) / torch.linalg.vector_norm(full[name])
        assert change < 8 * torch.finfo(dtype).eps, name  # a few roundings on the way through three layers


def scaled_steps(
    model: nn.Module, optimizer: NGD, scaler: Any, batches: list[tuple[Tensor, Tensor]], unscales: bool
) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        output = model(x)
        optimizer.fisher_backward(output)
        scaler.scale(F.cross_entropy(output, y)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
def test_a_grad_scaler_changes_no_weight(unscales: bool, fisher: str) -> None:
    found = []
    for enabled in (False, True):
        model, x, y = model_and_batch()
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=enabled)
        config = NGDConfig.model_validate({"staleness": EVERY_STEP, "fisher": {"kind": fisher}})
        optimizer = NGD(model, config, grad_scaler=scaler)
        scaled_steps(model, optimizer, scaler, [(x, y)] * 3, unscales)
        found.append(weights(model))

    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [{"kind": "kfac"}, {"kind": "ekfac"}])
def test_a_step_that_overflows_changes_nothing_but_the_scale(method: dict[str, str]) -> None:
    model, x, y = model_and_batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    config = NGDConfig.model_validate({"preconditioner": method, "ema_decay": 0.9, "fallback": AdamWFallback()})
    optimizer = NGD(model, config, grad_scaler=scaler)
    scaled_steps(model, optimizer, scaler, [(x, y)] * 3, unscales=False)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    running = {name: value for name, value in before[0].items() if "running" in name or "num_batches" in name}

    scaled_steps(model, optimizer, scaler, [(x * float("inf"), y)], unscales=False)
    model.load_state_dict(running, strict=False)  # the forward pass moved them: not the optimizer's to undo
    after = optimizer.state_dict()

    assert scaler.get_scale() == SCALE / 2
    assert optimizer.stats.skipped_steps == 1
    assert optimizer.stats.refreshes == []
    assert after["ngd"].pop("skipped_steps") == before[1]["ngd"].pop("skipped_steps") + 1
    assert str(after) == str(before[1])
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    scaled_steps(model, optimizer, scaler, [(x, y)], unscales=False)
    assert optimizer.stats.step == 4


def test_a_scaler_must_do_the_step() -> None:
    model, x, y = model_and_batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = NGD(model, grad_scaler=scaler)
    scaler.scale(F.cross_entropy(model(x), y)).backward()

    with pytest.raises(ConfigError, match=r"call scaler.step\(optimizer\)"):
        optimizer.step()


def test_a_gradient_that_is_not_finite_is_an_error_that_names_it() -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model)
    before = weights(model)
    F.cross_entropy(model(x * float("nan")), y).backward()

    with pytest.raises(NonFiniteError, match=r"gradient of '0.weight' is NaN or infinite on rank 0 of 1 in step 1"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_skipped_step_is_as_if_the_batch_had_not_been() -> None:
    found = []
    for bad_batch in (False, True):
        model, x, y = model_and_batch()
        model.eval()  # else the bad batch would enter batch norm's averages
        optimizer = NGD(model, NGDConfig(non_finite="skip", ema_decay=0.5))
        for step in range(4):
            inputs = [x * float("inf"), x] if bad_batch and step == 2 else [x]
            for batch in inputs:
                optimizer.zero_grad()
                F.cross_entropy(model(batch), y).backward()
                optimizer.step()
        found.append(weights(model))
        assert optimizer.stats.skipped_steps == int(bad_batch)

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def one_rank_overflows(rank: int, world_size: int, strategy: str) -> dict[str, Any]:
    """Rank 1 sees an infinity in the second of three steps, under a scaler, and then without one."""
    found: dict[str, Any] = {}
    for scales in (True, False):
        model, x, y = model_and_batch()
        model.eval()
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scales)
        config = NGDConfig.model_validate(
            {"strategy": {"kind": strategy}, "fisher": MonteCarlo(), "preconditioner": EKFAC()}
        )
        optimizer = NGD(model, config, grad_scaler=scaler)
        raised = "nothing"
        for step in range(3):
            factor = float("inf") if (rank, step) == (1, 1) else 1.0
            part = slice(rank, None, world_size)
            try:
                scaled_steps(model, optimizer, scaler, [(x[part] * factor, y[part])], unscales=False)
            except NonFiniteError as error:
                raised = str(error)
        found[f"scaled {scales}"] = (weights(model), scaler.get_scale(), optimizer.stats.skipped_steps, raised)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["all_reduce", "owner_sharded"])
def test_ranks_give_up_a_step_together(strategy: str) -> None:
    first, second = run_ranks(2, one_rank_overflows, strategy)

    for case in first:
        (ours, scale, skipped, raised), (theirs, other_scale, other_skipped, other_raised) = first[case], second[case]
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert (scale, skipped, raised) == (other_scale, other_skipped, other_raised)
        assert skipped == 1
        assert all(bool(torch.isfinite(weight).all()) for weight in ours)
    assert first["scaled True"][1] == SCALE / 2
    assert "gradient of '0.weight' is NaN or infinite on rank 1 of 2 in step 2" in first["scaled False"][3]

"""`NGD.state_dict`: what is saved is all that the next step needs, and what does not fit is refused whole."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.errors import CheckpointError
from tests.support.methods import LOCAL, SHIPPED
from tests.support.ranks import run_ranks
from tests.support.tensors import weights

STEPS, MORE, BATCH = 5, 3, 16
# Loose thresholds: small batches are noisy, and some statistics are to be stale when they are saved.
STALE = {"kind": "adaptive", "thresholds": dict.fromkeys(("A", "G", "S", "F", "Phi", "Psi", "a", "g"), 0.7)}
METHODS: dict[str, dict[str, Any]] = {
    "kfac": {"preconditioner": {"kind": "kfac"}},
    "kfac exact": {"preconditioner": {"kind": "kfac", "damping_form": "exact"}},
    "ekfac": {"preconditioner": {"kind": "ekfac"}},
    "lngd": {"preconditioner": {"kind": "lngd"}},
    # Its statistic is not saved, and is due at once after a load.
    "seng": {"preconditioner": {"kind": "seng"}, "staleness": {"kind": "fixed"}, "ema_decay": 0.0},
    "tkfac": {"preconditioner": {"kind": "tkfac"}},
    "eva": {"preconditioner": {"kind": "eva"}},
    "singd": {"preconditioner": {"kind": "singd"}},
    "singd low rank": {"preconditioner": {"kind": "singd", "structure": "low_rank", "width": 2}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "refreshed always": {"staleness": {"kind": "fixed"}, "ema_decay": 0.0},
    "velocity": {"momentum_mode": "proportional", "fallback": {"kind": "sgd"}},
    "damping schedule": {"damping_rule": {"kind": "exponential", "factor": 0.9, "every": 2}},
    "levenberg-marquardt": {"damping_rule": {"kind": "levenberg_marquardt", "every": 2}},
    "quadratic model": {"step_length": {"kind": "quadratic_model"}},
    "sgd": {"fallback": {"kind": "sgd"}},
    "burn-in": {"burn_in": STEPS},
}
CASES = METHODS | OTHERS


def config(case: str) -> NGDConfig:
    lr = {} if case == "quadratic model" else {"lr": 0.02}
    return NGDConfig.model_validate({"damping": 0.1, "ema_decay": 0.5, "staleness": STALE, **lr, **CASES[case]})


def build(case: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, NGD]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.PReLU(),  # not covered
        nn.Flatten(),
        nn.Linear(27, 6),
        nn.Tanh(),
        nn.Linear(6, 4),
    ).to(dtype)
    model[1].eval()  # fixed statistics: those of a batch depend on how it is split over ranks
    return model, NGD(model, config(case))


def train(model: nn.Module, optimizer: NGD, steps: range, rank: int = 0, world_size: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 1, 5, 5, generator=generator).to(dtype).chunk(world_size)[rank]
        y = torch.randint(4, (BATCH,), generator=generator).chunk(world_size)[rank]

        def objective(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            output = model(x)
            return F.cross_entropy(output, y), output

        optimizer.zero_grad()
        objective()[0].backward()
        optimizer.step(objective=objective if optimizer.config.needs_objective else None)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", [0, 2, STEPS])
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_run_goes_on_bit_for_bit(case: str, steps: int) -> None:
    model, optimizer = build(case)
    train(model, optimizer, range(steps))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    twin, other = build(case, seed=1)
    other.param_groups[0]["damping"] = 7.0
    train(twin, other, range(3))  # what it has of its own must not show

    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert str(other.state_dict()) == str(optimizer.state_dict())
    for which in ((model, optimizer), (twin, other)):
        train(*which, range(steps, steps + MORE))

    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(twin), strict=True))
    assert (other.stats.ages, other.stats.intervals) == (optimizer.stats.ages, optimizer.stats.intervals)
    assert other.stats.step == steps + MORE


def test_cases_save_stale_statistics_and_every_method() -> None:
    model, optimizer = build("kfac")
    train(model, optimizer, range(STEPS))

    assert max(optimizer.stats.ages) > 0
    assert {case["preconditioner"]["kind"] for case in METHODS.values()} == set(SHIPPED)


def test_counters_survive() -> None:
    _, optimizer = build("kfac")
    optimizer.stats.skipped_steps, optimizer.stats.failed_inversions = 3, 2
    _, other = build("kfac")

    other.load_state_dict(through_a_file(optimizer.state_dict()))

    assert (other.stats.skipped_steps, other.stats.failed_inversions) == (3, 2)


def test_a_state_loads_into_a_model_of_another_dtype() -> None:
    model, optimizer = build("ekfac")
    train(model, optimizer, range(STEPS))
    twin, other = build("ekfac", dtype=torch.float32)

    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for which in ((model, optimizer), (twin, other)):
        train(*which, range(STEPS, STEPS + 1))

    for ours, theirs in zip(weights(model), weights(twin), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)


def test_what_was_there_before_does_not_outlive_a_load() -> None:
    model, optimizer = build("ekfac")
    _, fresh = build("ekfac")
    train(model, optimizer, range(STEPS))

    optimizer.load_state_dict(fresh.state_dict())

    assert all(optimizer._curvature.caches.shared_of(layer.name) == {} for layer in optimizer.layers)
    assert not optimizer.state


def of_format_2(state: dict[str, Any]) -> None:
    state["ngd"]["format"] = 2


def without_ngd(state: dict[str, Any]) -> None:
    del state["ngd"]


def without_an_entry_of_a_cache(state: dict[str, Any]) -> None:
    del state["ngd"]["layers"]["4"]["cache"]["G"]


def with_a_wider_entry_of_a_cache(state: dict[str, Any]) -> None:
    state["ngd"]["layers"]["4"]["cache"]["G"] = torch.zeros(1, 7, 7)


def without_a_layer(state: dict[str, Any]) -> None:
    del state["ngd"]["layers"]["4"]


def without_history(state: dict[str, Any]) -> None:
    del state["ngd"]["layers"]["4"]["statistics"]["G"]["before"]


def with_momentum_of_another_shape(state: dict[str, Any]) -> None:
    state["state"][0]["momentum_buffer"] = torch.zeros(2)


def with_two_groups(state: dict[str, Any]) -> None:
    state["param_groups"].append({**state["param_groups"][0], "params": []})


def without_first_lr(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["first_lr"]


BROKEN: dict[Callable[[dict[str, Any]], None], str] = {
    of_format_2: "format must be 4, got 2",
    without_ngd: r"has the key 'ngd', got \['param_groups', 'state'\].*ShardedState",
    without_an_entry_of_a_cache: r"cache of layer '4' must have \['A', 'G'\], got \['A'\]",
    with_a_wider_entry_of_a_cache: r"G in the cache of layer '4' must be of shape \(1, 6, 6\), got \(1, 7, 7\)",
    without_a_layer: "not complete: layers has no '4'",
    without_history: "not complete: 4.G has no 'before'",
    with_momentum_of_another_shape: r"momentum of '0.weight' must be of shape \(3, 1, 3, 3\), got \(2,\)",
    with_two_groups: r"param_groups don't fit: they must have \[8\] parameters, got \[8, 0\]",
    without_first_lr: r"not complete: param_groups\[0\] has no 'first_lr'",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Callable[[dict[str, Any]], None]) -> None:
    model, optimizer = build("kfac")
    train(model, optimizer, range(STEPS))
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    _, other = build("kfac")
    before = str(other.state_dict())

    with pytest.raises(CheckpointError, match=BROKEN[damage]):
        other.load_state_dict(state)
    assert str(other.state_dict()) == before


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ("kfac", "ekfac", "of another model or preconditioner: missing .*'4.S'"),
        ("ekfac", "kfac", "of another model or preconditioner: .*unknown .*'4.S'"),
        ("kfac", "lngd", "of another model or preconditioner: missing .*'4.Phi'"),
        ("kfac", "kfac exact", r"cache of layer '0' must have \['A', 'G', 'inverse'\], got \['A', 'G'\]"),
        ("kfac exact", "kfac", r"cache of layer '0' must have \['A', 'G'\], got \['A', 'G', 'inverse'\]"),
        ("kfac", "velocity", "saved under momentum_mode 'correct', .* under 'proportional'"),
        ("quadratic model", "kfac", "saved under momentum_mode 'chosen'"),
        ("sgd", "kfac", "saved without fallback adamw"),
        ("kfac", "sgd", "saved with fallback adamw"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(saved: str, loaded: str, message: str) -> None:
    model, optimizer = build(saved)
    train(model, optimizer, range(STEPS))
    twin, other = build(loaded)
    train(twin, other, range(1))
    before = str(other.state_dict())

    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert str(other.state_dict()) == before


def test_a_fallback_of_other_parameters_is_refused_and_changes_nothing() -> None:
    model, optimizer = build("kfac")
    train(model, optimizer, range(STEPS))
    state = copy.deepcopy(optimizer.state_dict())
    state["ngd"]["fallback"]["another"] = state["ngd"]["fallback"].pop("2.weight")
    _, other = build("kfac")
    before = str(other.state_dict())

    with pytest.raises(CheckpointError, match=r"missing \['2.weight'\], unknown \['another'\]"):
        other.load_state_dict(state)
    assert str(other.state_dict()) == before


def test_a_velocity_can_be_loaded_where_momentum_is_chosen() -> None:
    model, optimizer = build("velocity")
    train(model, optimizer, range(STEPS))
    _, other = build("quadratic model")

    other.load_state_dict(optimizer.state_dict())

    assert other.param_groups[0]["lr"] == 0.02


def saved_and_resumed(rank: int, world_size: int) -> dict[str, Any]:
    """Returns, of every method: the state after STEPS, the weights after the next step, and those of a loaded run."""
    found: dict[str, Any] = {}
    for case in METHODS:
        model, optimizer = build(case)
        train(model, optimizer, range(STEPS), rank, world_size)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, range(STEPS, STEPS + MORE), rank, world_size)
        found[case] = (saved, weights(model), resumed(rank, world_size, *saved, case))
    return found


def resumed(rank: int, world_size: int, model_state: Any, state: Any, case: str) -> list[Tensor]:
    model, optimizer = build(case, seed=1)
    model.load_state_dict(model_state)
    optimizer.load_state_dict(copy.deepcopy(state))
    train(model, optimizer, range(STEPS, STEPS + MORE), rank, world_size)
    return weights(model)


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run_ranks(2, saved_and_resumed)


@pytest.mark.ranks
@pytest.mark.parametrize("case", METHODS)
def test_ranks_that_load_go_on_bit_for_bit(pair: list[dict[str, Any]], case: str) -> None:
    for rank in pair:
        _, expected, found = rank[case]
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.ranks
@pytest.mark.parametrize("case", [case for case in METHODS if case not in LOCAL])
def test_a_state_is_the_same_on_every_rank_and_loads_on_one(pair: list[dict[str, Any]], case: str) -> None:
    (saved, expected, _), (elsewhere, *_) = (rank[case] for rank in pair)

    assert str(saved) == str(elsewhere)
    # Sums over ranks in another order: rounding in float64, multiplied by the condition number of the damped factors.
    for ours, theirs in zip(resumed(0, 1, *saved, case), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

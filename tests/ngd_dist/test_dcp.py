"""`ShardedState` under torch.distributed.checkpoint: any number of ranks saves, any number loads."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ngd_dist import NGD, NGDConfig, ShardedState
from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import CheckpointError
from tests.support.ranks import run_ranks
from tests.support.tensors import weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

STEPS, MORE, BATCH = 4, 3, 16
STALE = {"kind": "adaptive", "thresholds": dict.fromkeys(("A", "G", "S", "F", "Phi", "Psi"), 0.7)}
CASES: dict[str, dict[str, Any]] = {
    "kfac": {},
    "kfac exact": {"preconditioner": {"kind": "kfac", "damping_form": "exact"}},
    "ekfac": {"preconditioner": {"kind": "ekfac"}},
    "lngd": {"preconditioner": {"kind": "lngd"}},
    "all_reduce": {"strategy": {"kind": "all_reduce"}},
    "all hold": {"strategy": {"kind": "owner_sharded", "replicate_below": 0, "fraction": 1.0}},
    "replicated": {"strategy": {"kind": "owner_sharded"}},
    "sgd": {"fallback": {"kind": "sgd"}},
}


def build(case: str, seed: int = 0, width: int = 6) -> tuple[nn.Module, NGD]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.PReLU(),  # not covered
        nn.Flatten(),
        nn.Linear(27, width),
        nn.Tanh(),
        nn.Linear(width, 4),
    ).double()
    model[1].eval()  # fixed statistics: those of a batch depend on how it is split over ranks
    if dist.is_initialized():  # else every layer here is small enough to be replicated
        settings: dict[str, Any] = {"strategy": {"kind": "owner_sharded", "replicate_below": 0}}
    else:
        settings = {}
    settings |= {"lr": 0.02, "damping": 0.1, "ema_decay": 0.5, "staleness": STALE, **CASES[case]}
    return model, NGD(model, NGDConfig.model_validate(settings))


def train(model: nn.Module, optimizer: NGD, steps: range, rank: int = 0, world_size: int = 1) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 1, 5, 5, dtype=torch.float64, generator=generator).chunk(world_size)[rank]
        y = torch.randint(4, (BATCH,), generator=generator).chunk(world_size)[rank]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def save(model: nn.Module, optimizer: NGD, folder: Path) -> None:
    dcp.save({"model": model.state_dict(), "optimizer": ShardedState(optimizer)}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: NGD, folder: Path) -> None:
    dcp.load({"model": model.state_dict(), "optimizer": ShardedState(optimizer)}, checkpoint_id=folder)


def trained(case: str, steps: int = STEPS) -> tuple[nn.Module, NGD]:
    model, optimizer = build(case)
    train(model, optimizer, range(steps))
    return model, optimizer


def keys(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the shapes of a state's tensors by kind and key; of its plain values the type."""
    kinds = {kind: part if isinstance(part, dict) else {"": part} for kind, part in state.items()}
    return {
        f"{kind}.{key}": value.shape if isinstance(value, Tensor) else type(value)
        for kind, part in kinds.items()
        for key, value in part.items()
    }


@pytest.mark.parametrize("steps", [0, 1, STEPS])
@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_bit_for_bit(case: str, steps: int, tmp_path: Path) -> None:
    model, optimizer = trained(case, steps)
    save(model, optimizer, tmp_path)
    twin, other = build(case, seed=1)
    train(twin, other, range(2))  # what it has of its own must not show

    load(twin, other, tmp_path)
    assert str(other.state_dict()) == str(optimizer.state_dict())
    for which in ((model, optimizer), (twin, other)):
        train(*which, range(steps, steps + MORE))

    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(twin), strict=True))
    assert other.stats.ages == optimizer.stats.ages


@pytest.mark.parametrize("case", CASES)
def test_the_structure_is_the_same_before_and_after_training(case: str) -> None:
    _, fresh = build(case)
    _, optimizer = trained(case)

    assert keys(ShardedState(fresh).state_dict()) == keys(ShardedState(optimizer).state_dict())


def test_training_on_changes_nothing_that_is_being_saved() -> None:
    model, optimizer = trained("ekfac")
    state = ShardedState(optimizer).state_dict()
    before = copy.deepcopy(state)

    train(model, optimizer, range(STEPS, STEPS + MORE))

    assert str(state) == str(before)


@pytest.mark.parametrize(
    ("saved", "loaded", "error", "message"),
    [
        ("kfac exact", "kfac", CheckpointError, "cache of layer '0' must have"),
        ("kfac", "sgd", CheckpointError, "saved with fallback adamw"),
        ("ekfac", "kfac", CheckpointError, "cache of layer '0' must have"),
        ("kfac", "ekfac", CheckpointException, r"Missing key in checkpoint state_dict: optimizer.statistics.0.S"),
        ("sgd", "kfac", CheckpointException, r"Missing key in checkpoint state_dict: optimizer.fallback.2.weight"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_and_changes_nothing(
    saved: str, loaded: str, error: type[BaseException], message: str, tmp_path: Path
) -> None:
    save(*trained(saved), tmp_path)
    model, optimizer = trained(loaded, steps=1)
    before = str(optimizer.state_dict())

    with pytest.raises(error, match=message):
        load(model, optimizer, tmp_path)
    assert str(optimizer.state_dict()) == before


def test_a_checkpoint_of_a_wider_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    save(*trained("kfac"), tmp_path)
    _, optimizer = build("kfac", width=7)
    before = str(optimizer.state_dict())

    with pytest.raises(CheckpointException, match=r"Size mismatch.*optimizer"):
        dcp.load({"optimizer": ShardedState(optimizer)}, checkpoint_id=tmp_path)
    assert str(optimizer.state_dict()) == before


def test_a_checkpoint_of_more_layers_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    save(*trained("kfac"), tmp_path)
    model, _ = build("kfac")
    optimizer = NGD(model, NGDConfig(), param_groups=[{"params": list(model[0].parameters())}])
    before = str(optimizer.state_dict())

    with pytest.raises(CheckpointError, match=r"unknown \['1.F', '4.A', '4.G', '6.A', '6.G'\]"):
        dcp.load({"optimizer": ShardedState(optimizer)}, checkpoint_id=tmp_path)
    assert str(optimizer.state_dict()) == before


def test_torchs_own_way_to_save_an_optimizer_is_refused_at_load() -> None:
    model, optimizer = trained("sgd")

    state = get_optimizer_state_dict(model, optimizer)

    assert state.keys() == {"state", "param_groups"}
    with pytest.raises(CheckpointError, match=r"save ngd_dist\.ShardedState"):
        set_optimizer_state_dict(model, optimizer, state)


def save_every_case(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        model, optimizer = build(case)
        train(model, optimizer, range(STEPS), rank, world_size)
        with mock.patch.object(Communicator, "all_gather_object", side_effect=AssertionError("gathered")):
            save(model, optimizer, folder / case)
        state = ShardedState(optimizer).state_dict()
        train(model, optimizer, range(STEPS, STEPS + MORE), rank, world_size)
        found[case] = (weights(model), keys(state))
    return found


def load_every_case(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        model, optimizer = build(case, seed=1)
        with mock.patch.object(Communicator, "all_gather_object", side_effect=AssertionError("gathered")):
            load(model, optimizer, folder / case)
        held = {key.layer for key, s in optimizer._curvature.statistics.items() if s.value is not None}
        train(model, optimizer, range(STEPS, STEPS + MORE), rank, world_size)
        found[case] = (weights(model), held)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def savers(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, save_every_case, folder)


@pytest.fixture(scope="module", params=[2, 4])
def loaders(request: pytest.FixtureRequest, savers: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return run_ranks(request.param, load_every_case, folder)


def assert_goes_on(found: list[Tensor], expected: list[Tensor], *, is_same_world: bool) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        # Sums over ranks in another order: rounding in float64, times the condition number of the damped factors.
        torch.testing.assert_close(ours, theirs, rtol=0 if is_same_world else 1e-9, atol=0 if is_same_world else 1e-9)


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_ranks_load_what_two_saved(savers: list[dict[str, Any]], loaders: list[dict[str, Any]], case: str) -> None:
    for rank in loaders:
        assert_goes_on(rank[case][0], savers[0][case][0], is_same_world=len(loaders) == 2)


@pytest.mark.ranks
def test_a_rank_loads_the_layers_that_it_owns_and_no_others(loaders: list[dict[str, Any]]) -> None:
    held = [rank["kfac"][1] for rank in loaders]

    assert sum(len(layers) for layers in held) == len(set.union(*held)) == 4
    assert all(len(rank[case][1]) == 4 for rank in loaders for case in ("all_reduce", "replicated"))


@pytest.mark.ranks
@pytest.mark.usefixtures("savers")
@pytest.mark.parametrize("case", CASES)
def test_one_process_loads_what_two_ranks_saved(savers: list[dict[str, Any]], folder: Path, case: str) -> None:
    model, optimizer = build(case, seed=1)

    load(model, optimizer, folder / case)
    train(model, optimizer, range(STEPS, STEPS + MORE))

    assert_goes_on(weights(model), savers[0][case][0], is_same_world=False)


@pytest.mark.ranks
def test_a_rank_brings_what_it_holds_and_the_bases_that_every_rank_has(savers: list[dict[str, Any]]) -> None:
    def brought(case: str, kind: str) -> list[set[str]]:
        return [{key for key in rank[case][1] if key.startswith(kind + ".")} for rank in savers]

    assert set.intersection(*brought("kfac", "statistics")) == set.intersection(*brought("kfac", "caches")) == set()
    assert len(set.union(*brought("kfac", "statistics"))) == 7
    assert set.intersection(*brought("ekfac", "caches")) == {f"caches.{layer}.{s}" for layer in "046" for s in "AG"}
    assert len(set.intersection(*brought("all hold", "caches"))) == 7
    assert set.intersection(*brought("all hold", "statistics")) == set()
    # Replicas of a statistic are shared out by torch; its past is kept on one rank alone.
    assert len(set.intersection(*brought("all_reduce", "statistics"))) == 7
    assert set.intersection(*brought("all_reduce", "before")) == set()


@pytest.mark.ranks
def test_ranks_load_what_one_process_saved(tmp_path: Path) -> None:
    expected = {}
    for case in CASES:
        model, optimizer = trained(case)
        save(model, optimizer, tmp_path / case)
        train(model, optimizer, range(STEPS, STEPS + MORE))
        expected[case] = weights(model)

    loaders = run_ranks(2, load_every_case, tmp_path)

    for case in CASES:
        for rank in loaders:
            assert_goes_on(rank[case][0], expected[case], is_same_world=False)

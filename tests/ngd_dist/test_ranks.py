"""The same global batch gives the same weights on any number of ranks, by any strategy, and after a restart."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import AdaptiveInterval, AllReduce, FixedInterval, OwnerSharded, Settings, Thresholds
from ngd_dist.errors import CaptureError
from tests.support.ranks import run_ranks
from tests.support.tensors import weights

pytestmark = pytest.mark.ranks

STEPS = 6
BATCH = 16
REFRESH_ALWAYS = FixedInterval(steps=1)
ADAPTIVE = AdaptiveInterval(thresholds=Thresholds(A=0.6, G=0.6, F=0.6))  # loose: small batches are noisy
SHARDED = OwnerSharded(replicate_below=0)  # every layer here is small enough to be replicated
CASES: dict[str, tuple[Settings, Settings, int, torch.dtype]] = {
    "all_reduce": (AllReduce(), REFRESH_ALWAYS, 1, torch.float64),
    "owner_sharded": (SHARDED, REFRESH_ALWAYS, 1, torch.float64),
    "all_reduce adaptive": (AllReduce(), ADAPTIVE, 1, torch.float64),
    "owner_sharded adaptive": (SHARDED, ADAPTIVE, 1, torch.float64),
    "owner_sharded micro-batches": (SHARDED, ADAPTIVE, 2, torch.float64),
    "all_reduce micro-batches": (AllReduce(), ADAPTIVE, 2, torch.float64),
    "half of the ranks": (OwnerSharded(fraction=0.5, replicate_below=0), ADAPTIVE, 1, torch.float64),
    "all ranks": (OwnerSharded(fraction=1, replicate_below=0), ADAPTIVE, 1, torch.float64),
    # The two larger convolutions and linear layers have an owner, the others are everywhere.
    "small ones replicated": (OwnerSharded(replicate_below=3000), ADAPTIVE, 1, torch.float64),
    "many buckets": (SHARDED, ADAPTIVE, 1, torch.float64),
    "all_reduce float32": (AllReduce(), REFRESH_ALWAYS, 1, torch.float32),
    "owner_sharded float32": (SHARDED, REFRESH_ALWAYS, 1, torch.float32),
}
BUCKET_MB = {"many buckets": 1e-6, "owner_sharded": 0.0}
RESUMED = (
    "owner_sharded adaptive",
    "all_reduce adaptive",
    "owner_sharded float32",
    "half of the ranks",
    "all ranks",
    "small ones replicated",
)
STRATEGIES = ("all_reduce", "owner_sharded", "half of the ranks", "all ranks")
ROUNDED = ("bfloat16", "float16")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def build_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.PReLU(),  # not covered: takes the plain step
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.Tanh(),
        nn.Linear(8, 5),
    ).to(dtype)
    # Batch statistics would be each rank's own: the global batch is the same on every split only with fixed ones.
    model[1].eval()
    return model


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 6, 6, dtype=dtype, generator=generator), torch.randint(
        5, (BATCH,), generator=generator
    )


def train(model: nn.Module, optimizer: NGD, steps: range, rank: int, world_size: int) -> None:
    micro = optimizer.config.micro_batches
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = (part.chunk(world_size)[rank] for part in batch(step, dtype))
        optimizer.zero_grad()
        for part, target in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (F.cross_entropy(model(part), target) / micro).backward()
        optimizer.step()


def config(case: str, **changes: Any) -> NGDConfig:
    strategy, staleness, micro, _ = CASES[case]
    settings = {"strategy": strategy, "staleness": staleness, "micro_batches": micro, "damping": 0.1}
    settings |= {"bucket_mb": BUCKET_MB.get(case, 25.0), **changes}
    return NGDConfig.model_validate(settings)


def single_process(case: str, steps: int) -> list[Tensor]:
    model = build_model(CASES[case][3])
    optimizer = NGD(model, config(case, strategy=None))
    train(model, optimizer, range(steps), 0, 1)
    return weights(model)


def train_every_case(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case, (*_, dtype) in CASES.items():
        model = build_model(dtype)
        optimizer = NGD(model, config(case))
        train(model, optimizer, range(STEPS), rank, world_size)
        found[case] = weights(model)
        if case in RESUMED:
            # As torch's, the state's tensors are the live ones.
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            train(model, optimizer, range(STEPS, STEPS + 1), rank, world_size)
            found[f"saved {case}"] = saved
            found[f"next {case}"] = weights(model)
            found[f"reloaded {case}"] = resume(rank, world_size, *saved, case)
            found[f"held {case}"] = held_after_loading(saved[1], case)
    found["bytes"] = {case: bytes_of_a_refresh(case, rank, world_size) for case in STRATEGIES}
    return found


def held_after_loading(state: Any, case: str) -> set[str]:
    optimizer = NGD(build_model(CASES[case][3]), config(case))
    optimizer.load_state_dict(copy.deepcopy(state))
    return {key.layer for key, statistic in optimizer._curvature.statistics.items() if statistic.value is not None}


def resume(rank: int, world_size: int, model_state: Any, state: Any, case: str) -> list[Tensor]:
    model = build_model(CASES[case][3])
    optimizer = NGD(model, config(case, **({"strategy": None} if world_size == 1 else {})))
    model.load_state_dict(model_state)
    optimizer.load_state_dict(copy.deepcopy(state))
    train(model, optimizer, range(STEPS, STEPS + 1), rank, world_size)
    return weights(model)


def bytes_of_a_refresh(case: str, rank: int, world_size: int) -> dict[str, int]:
    model = build_model(torch.float32)
    optimizer = NGD(model, config(case))
    train(model, optimizer, range(1), rank, world_size)
    return optimizer.stats.bytes_sent


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(request.param, train_every_case)


def test_every_strategy_gives_the_single_process_weights(ranks: list[dict[str, Any]]) -> None:
    for case, (*_, dtype) in CASES.items():
        expected = single_process(case, STEPS)
        for ours, theirs in zip(ranks[0][case], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=case)


def test_ranks_do_not_drift_apart_by_a_single_bit(ranks: list[dict[str, Any]]) -> None:
    for case in CASES:
        for other in ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(ranks[0][case], other[case], strict=True)), case


@pytest.mark.parametrize("case", RESUMED)
def test_a_reloaded_run_takes_the_same_next_step(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        pairs = zip(rank[f"next {case}"], rank[f"reloaded {case}"], strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_rank_loads_the_layers_that_it_owns_and_no_others(ranks: list[dict[str, Any]]) -> None:
    held = [rank["held owner_sharded adaptive"] for rank in ranks]

    assert sum(len(layers) for layers in held) == len(set.union(*held)) == 5
    assert all(len(rank["held all_reduce adaptive"]) == 5 for rank in ranks)
    inverted = [rank["held small ones replicated"] for rank in ranks]
    assert set.intersection(*inverted) == {"0", "1", "8"}
    assert sum("3" in layers for layers in inverted) == sum("6" in layers for layers in inverted) == 1


@pytest.mark.parametrize("case", RESUMED)
def test_a_state_loads_at_another_world_size(ranks: list[dict[str, Any]], case: str) -> None:
    alone = resume(0, 1, *ranks[0][f"saved {case}"], case)

    tolerance = TOLERANCE[CASES[case][3]]
    for ours, theirs in zip(alone, ranks[0][f"next {case}"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", STRATEGIES)
def test_a_strategy_for_many_works_in_one_process(case: str) -> None:
    model = build_model(torch.float64)
    optimizer = NGD(model, config(case))

    train(model, optimizer, range(STEPS), 0, 1)

    for ours, theirs in zip(weights(model), single_process(case, STEPS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_directions_travel_to_those_that_do_not_hold_a_layer_and_inverses_to_those_that_do(
    ranks: list[dict[str, Any]],
) -> None:
    sent = {case: sum_of([rank["bytes"][case] for rank in ranks]) for case in STRATEGIES}

    assert "directions" not in sent["all_reduce"] | sent["all ranks"]
    assert "inverses" not in sent["all_reduce"] | sent["owner_sharded"]
    assert sent["all ranks"]["inverses"] > 0
    if len(ranks) == 4:
        assert 0 < sent["half of the ranks"]["directions"] < sent["owner_sharded"]["directions"]
        assert 0 < sent["half of the ranks"]["inverses"] < sent["all ranks"]["inverses"]


def sum_of(parts: list[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(part.get(kind, 0) for part in parts) for kind in set().union(*parts)}


def test_a_state_of_one_process_loads_on_two_ranks() -> None:
    case = "owner_sharded adaptive"
    model = build_model(torch.float64)
    optimizer = NGD(model, config(case, strategy=None))
    train(model, optimizer, range(STEPS), 0, 1)
    model_state, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(STEPS, STEPS + 1), 0, 1)

    resumed = run_ranks(2, resume, model_state, state, case)

    for rank in resumed:
        for ours, theirs in zip(rank, weights(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def wrapped_and_bare(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor], dict[str, int]]:
    found: list[list[Tensor]] = []
    sent: dict[str, int] = {}
    for wraps in (True, False):
        model = build_model(torch.float64)
        forward = DistributedDataParallel(model) if wraps else model
        optimizer = NGD(forward, config("many buckets"))
        train(forward, optimizer, range(2), rank, world_size)
        found.append(weights(model))
        sent = optimizer.stats.bytes_sent if wraps else sent
    return found[0], found[1], sent


def rounded_inverses(dtype: str, rank: int, world_size: int) -> tuple[list[Tensor], int]:
    """Returns the weights, and the bytes of inverses that this rank has sent."""
    model = build_model(torch.float64)
    optimizer = NGD(model, config("all ranks", staleness=REFRESH_ALWAYS, inverse_dtype=dtype, **alone(world_size)))
    sent = 0
    for step in range(3):
        train(model, optimizer, range(step, step + 1), rank, world_size)
        sent += optimizer.stats.bytes_sent.get("inverses", 0)
    return weights(model), sent


def summed(rank: int, world_size: int) -> list[Tensor]:
    """Trains on a loss that is summed, not averaged, over the samples."""
    model = build_model(torch.float64)
    optimizer = NGD(model, config("owner_sharded", loss_reduction="sum", lr=0.01, **alone(world_size)))
    for step in range(3):
        x, y = (part.chunk(world_size)[rank] for part in batch(step, torch.float64))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
    return weights(model)


def alone(world_size: int) -> dict[str, Any]:
    return {"strategy": None} if world_size == 1 else {}


def one_rank_has_a_micro_batch_too_many(rank: int, world_size: int) -> list[str]:
    """Returns what each of two steps raised: the second one is in order again."""
    layer = nn.Linear(3, 3).double()
    optimizer = NGD(layer, config("owner_sharded").model_copy(update={"micro_batches": 2}))
    raised = []
    for step in range(2):
        optimizer.zero_grad()
        for _ in range(3 if (rank, step) == (0, 0) else 2):
            layer(torch.ones(4, 3, dtype=torch.float64)).square().sum(1).mean().backward()
        try:
            optimizer.step()
            raised.append("nothing")
        except CaptureError as error:
            raised.append(str(error))
    return raised


def half_the_ranks_use_a_layer(rank: int, world_size: int) -> tuple[list[Tensor], list[int], dict[str, Tensor]]:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "sometimes": nn.Linear(3, 2)}).double()
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    optimizer = NGD(model, config("owner_sharded"))
    x = torch.full((4, 3), 1.0 + rank, dtype=torch.float64)
    out = model["used"](x) + (model["sometimes"](x) if rank == 0 else 0)
    (out**2).sum(1).mean().backward()
    own = {str(key): value for key, value in optimizer._capture.take().items()}
    optimizer.step()
    held = {str(key): s.value for key, s in optimizer._curvature.statistics.items() if s.value is not None}
    return weights(model), optimizer.stats.ages, {"own": own, "held": held}


def bfloat16_wire(rank: int, world_size: int) -> tuple[dict[str, int], list[Tensor]]:
    model = build_model(torch.float32)
    optimizer = NGD(model, config("owner_sharded", statistics_wire="bfloat16"))
    train(model, optimizer, range(1), rank, world_size)
    return optimizer.stats.bytes_sent, weights(model)


def variants(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "wrapped": wrapped_and_bare(rank, world_size),
        "unused": half_the_ranks_use_a_layer(rank, world_size),
        "bfloat16": bfloat16_wire(rank, world_size),
        "bytes": {case: bytes_of_a_refresh(case, rank, world_size) for case in STRATEGIES},
        "single": refuses_single(),
        "summed": summed(rank, world_size),
        "inverses": {dtype: rounded_inverses(dtype, rank, world_size) for dtype in ("float32", *ROUNDED)},
        "too many": one_rank_has_a_micro_batch_too_many(rank, world_size),
    }


def refuses_single() -> str:
    try:
        NGD(build_model(torch.float32), NGDConfig.model_validate({"strategy": {"kind": "single"}}))
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run_ranks(2, variants)


def test_ddp_averages_the_gradients_once(pair: list[dict[str, Any]]) -> None:
    wrapped, bare, sent = pair[0]["wrapped"]

    assert sent["gradients"] < 300  # bytes: the counts of captured layers alone
    for ours, theirs in zip(wrapped, bare, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_inverses_travel_in_16_bits_without_losing_more(pair: list[dict[str, Any]], dtype: str) -> None:
    exact, rounded = ([rank["inverses"][kept] for rank in pair] for kept in ("float32", dtype))
    alone, _ = rounded_inverses(dtype, 0, 1)

    assert all(torch.equal(a, b) for a, b in zip(rounded[0][0], rounded[1][0], strict=True))
    for ours, theirs in zip(rounded[0][0], alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert sum(sent for _, sent in rounded) < sum(sent for _, sent in exact) / 2  # of eight bytes, not all inverses


def test_a_layer_that_only_some_ranks_use_neither_hangs_nor_drifts(pair: list[dict[str, Any]]) -> None:
    (first, ages, seen), (second, _, elsewhere) = (rank["unused"] for rank in pair)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert ages == [0, 0, 0, 0]
    held = seen["held"] | elsewhere["held"]
    for name in ("sometimes.A", "sometimes.G"):  # the mean over the ranks that ran it: rank 0's own
        torch.testing.assert_close(held[name], seen["own"][name])


def test_a_summed_loss_gives_the_single_process_weights(pair: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(pair[0]["summed"], summed(0, 1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_micro_batch_too_many_on_one_rank_is_an_error_on_all_and_the_next_step_is_not(
    pair: list[dict[str, Any]],
) -> None:
    here, there = pair[0]["too many"], pair[1]["too many"]

    assert "layer '' was differentiated 3 times" in here[0]
    assert "on another rank" in there[0]
    assert here[1] == there[1] == "nothing"


def test_owners_receive_half_of_what_an_all_reduce_sends(pair: list[dict[str, Any]]) -> None:
    sent = {case: sum(rank["bytes"][case]["statistics"] for rank in pair) for case in STRATEGIES}

    # Triangles of float32, and 3 numbers for each of 4 channels: each goes from the one rank to the other, and back.
    factors = [9, 4, 37, 6, 25, 8, 9, 5]
    numbers = sum(n * (n + 1) // 2 for n in factors) + 3 * 4
    assert sent["owner_sharded"] == pytest.approx(4 * numbers, abs=8 * len(factors))  # aligned to 8 bytes
    assert sent["all_reduce"] == 2 * sent["owner_sharded"]


def test_bfloat16_halves_all_but_the_diagonals(pair: list[dict[str, Any]]) -> None:
    sent, ours = (pair[0]["bfloat16"][0]["statistics"] + pair[1]["bfloat16"][0]["statistics"], pair[0]["bfloat16"][1])

    factors = [9, 4, 37, 6, 25, 8, 9, 5]
    numbers = sum(4 * n + 2 * (n * (n - 1) // 2) for n in factors) + 4 * 3 * 4
    assert sent == pytest.approx(numbers, abs=16 * len(factors))
    assert all(torch.equal(a, b) for a, b in zip(ours, pair[1]["bfloat16"][1], strict=True))
    for rounded, exact in zip(ours, single_process("owner_sharded float32", 1), strict=True):
        torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-3)


def test_single_refuses_a_group_of_two(pair: list[dict[str, Any]]) -> None:
    assert "needs one process, got a group of 2" in pair[0]["single"]

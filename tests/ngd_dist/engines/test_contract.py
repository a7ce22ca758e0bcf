"""Under every engine six steps are those of one process on the same global batch, and a state goes from one to another.

DistributedDataParallel and FSDP2 are held to float64's rounding; DeepSpeed's master weights are float32.
"""

import pickle
import re
from functools import cache, partial
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from ngd_dist.config import (
    EKFAC,
    SENG,
    SINGD,
    TKFAC,
    AdamWFallback,
    AdaptiveInterval,
    AllReduce,
    Eva,
    Exact,
    ExponentialDamping,
    KLClip,
    NormClip,
    OwnerSharded,
    SGDFallback,
)
from ngd_dist.model_card import card_of
from tests.support.engine_faults import (
    clipped,
    overflowing,
    preconditioned_with_a_bad_piece,
    refused_by_deepspeed,
    refused_by_fsdp2,
    with_a_bad_piece,
)
from tests.support.engines import (
    FLOAT64,
    LENGTH,
    STEPS,
    ZERO,
    Case,
    Checkpointed,
    Images,
    Net,
    Recurrent,
    Run,
    Tied,
    Unused,
    Weights,
    launched,
    new_net,
    train,
)
from tests.support.ranks import run_ranks

GROUPS = {"ddp": ("ddp", "fsdp2"), "fsdp2": ("ddp", "fsdp2"), **dict.fromkeys(ZERO, ZERO)}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
FALLING = tuple(0.1 * (1 - step / 10) for step in range(STEPS))
CASES = {
    "momentum": Case({"fallback": SGDFallback()}),
    "no momentum, weight decay": Case({"momentum": 0.0, "weight_decay": 0.1}),
    "proportional momentum": Case({"momentum_mode": "proportional"}, lrs=FALLING),
    "accumulation": Case(passes=2),
    "kl clip": Case({"clip": KLClip(max_kl=1e-4)}),
    "norm clip": Case({"clip": NormClip(max_norm=0.5)}),
    "gradient norm above 1": Case(factor=30.0),
    "weights rescaled": Case({"weight_rescaling": "always"}),
    "weights shrunk": Case({"weight_rescaling": "shrink"}),
    "adamw fallback": Case({"fallback": AdamWFallback(lr=0.01, weight_decay=0.1), "weight_decay": 0.1}),
    "exact Fisher": Case({"fisher": Exact()}, has_fisher_passes=True),
    "ekfac": Case({"preconditioner": EKFAC(), "damping": 0.3, "damping_rule": ExponentialDamping(factor=0.5, every=2)}),
    "tkfac": Case({"preconditioner": TKFAC()}),
    "eva": Case({"preconditioner": Eva()}),
    "singd": Case({"preconditioner": SINGD()}),
    "all ranks invert": Case({"strategy": AllReduce()}),
    "half of the ranks hold": Case({"strategy": OwnerSharded(fraction=0.5, replicate_below=0)}),
    "small layers everywhere": Case({"strategy": OwnerSharded()}),
    "a frozen layer": Case(frozen="hidden"),
    "a group of its own": Case(has_groups=True),
    "tied weights": Case({"lr": 0.05}, net=Tied),
    "layers that run again in backward": Case(net=Checkpointed, passes=2),
    "a layer without a gradient": Case({"weight_decay": 0.1, "weight_rescaling": "always"}, net=Unused),
    "images": Case({"lr": 0.05}, net=Images),
    "recurrent": Case({"lr": 0.05}, net=Recurrent),
    "preconditioner before SGD": Case(inner=SGD),
    "preconditioner before AdamW": Case(inner=ADAMW),
}
# The weights that the model runs with have 8 or 11 bits; master weights, statistics and directions have more.
SIXTEEN_BITS = {
    "bfloat16": Case({"momentum": 0.0}, deepspeed={"bf16": {"enabled": True}}, is_bfloat16=True),
    "float16": Case({"momentum": 0.0}, deepspeed={"fp16": {"enabled": True, "loss_scale": 128}}),
}
IN_16_BITS = [("bfloat16", "fsdp2"), *product(SIXTEEN_BITS, ZERO[1:])]
# Each rank has its own samples' statistics: held to a bare model on as many ranks.
LOCAL = Case({"preconditioner": SENG(), "damping": 0.3, "clip": KLClip(max_kl=1e-2)})
ADAPTIVE = Case({"staleness": AdaptiveInterval()})
# Saved at half time under one engine, and loaded under another.
RESUMED = Case({"fallback": AdamWFallback(lr=0.01)})
PAIRS = {
    ("ddp", "fsdp2"): [("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "bare")],
    ZERO: [("zero1", "zero3"), ("zero3", "zero2"), ("zero2", "zero2"), ("zero3", "bare")],
}
LAYERS = 5  # of Net that are covered
# Sums over ranks round in another order than those of one process; float32 has 6e-8, and 6 steps amplify it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


# The default run has each case at ZeRO 2, and at the other stages those that go ways of their own there.
OF_OTHER_STAGES = ("momentum", "accumulation", "kl clip", "norm clip", "adamw fallback", "tied weights", "images")
OF_OTHER_STAGES += (
    "recurrent",
    "exact Fisher",
    "weights rescaled",
    "half of the ranks hold",
    "preconditioner before SGD",
)


def fits(engine: str, name: str, world_size: int) -> bool:
    if CASES[name].net is Unused:  # others count zeros, or refuse
        return engine == "fsdp2"
    if engine == "zero3" and CASES[name].has_fisher_passes:
        return False
    return engine not in ("zero0", "zero1", "zero3") or world_size > 2 or name in OF_OTHER_STAGES


def of_group(rank: int, world_size: int, engines: tuple[str, ...], middle: bytes, folder: str) -> dict[Any, Any]:
    outcomes: dict[Any, Any] = {}
    with launched(rank, world_size):
        for engine in engines:
            for name, case in CASES.items():
                if fits(engine, name, world_size):
                    outcomes[engine, name] = train(engine, case)
            outcomes[engine, "from one process"] = second_half(engine, *pickle.loads(middle))
            outcomes[engine, "to one process"] = first_half(engine)
            outcomes[engine, "sent"] = sent(engine)
        for before, then in PAIRS[engines]:
            outcomes[before, then] = train(before, RESUMED, then=then)
        outcomes |= beside(rank, engines, folder) if world_size == 2 else {}
    return outcomes


def beside(rank: int, engines: tuple[str, ...], folder: str) -> dict[Any, Any]:
    outcomes: dict[Any, Any] = {("adaptive", engine): adaptive(engine) for engine in ("bare", *engines)}
    outcomes |= {("local", engine): train(engine, LOCAL) for engine in ("bare", *engines)}
    for name, engine in IN_16_BITS:
        if engine in engines:
            outcomes["16 bits", name, engine] = train(engine, SIXTEEN_BITS[name])
    if engines == ZERO:
        outcomes |= {("overflow", engine): overflowing(engine) for engine in ZERO[1:]}
        outcomes |= {("refusals", engine): refused_by_deepspeed(engine) for engine in ZERO}
        outcomes |= {("by DeepSpeed", engine): saved_by_deepspeed(engine, folder) for engine in ZERO[2:]}
        outcomes["clipped"] = clipped("zero2")
    else:
        outcomes["bad piece"], outcomes["refusals", "fsdp2"] = with_a_bad_piece(rank), refused_by_fsdp2()
        outcomes["bad piece alone"] = preconditioned_with_a_bad_piece(rank)
    return outcomes


def adaptive(engine: str) -> tuple[Weights, list[int], list[int]]:
    run = Run(engine, ADAPTIVE)
    for number in range(STEPS):
        run.step(number)
    outcome = run.weights(), run.optimizer.stats.intervals, run.optimizer.stats.ages
    run.close()
    return outcome


def saved_by_deepspeed(engine: str, folder: str) -> Weights:
    run = Run(engine, RESUMED)
    for number in range(STEPS // 2):
        run.step(number)
    run.model.save_checkpoint(f"{folder}/{engine}", client_state={"ngd": run.optimizer.state_dict()})
    run.close()
    run = Run(engine, RESUMED)
    _, client_state = run.model.load_checkpoint(f"{folder}/{engine}")
    run.optimizer.load_state_dict(client_state["ngd"])
    for number in range(STEPS // 2, STEPS):
        run.step(number)
    weights = run.weights()
    run.close()
    return weights


def first_half(engine: str) -> tuple[Weights, Any]:
    run = Run(engine, RESUMED)
    for number in range(STEPS // 2):
        run.step(number)
    saved = run.weights(), run.optimizer.state_dict()
    run.close()
    return saved


def second_half(engine: str, weights: Weights, state: Any) -> Weights:
    run = Run(engine, RESUMED, weights=weights, state=state)
    for number in range(STEPS // 2, STEPS):
        run.step(number)
    weights = run.weights()
    run.close()
    return weights


def sent(engine: str) -> dict[str, float]:
    """Returns the numbers that the optimizer of this rank sends by kind in a step that refreshes nothing."""
    run = Run(engine, Case({"stagger": 0.0}))
    for number in range(2):
        run.step(number)
    stats, size = run.optimizer.stats, run.dtype.itemsize
    run.close()
    return {kind: nbytes / size for kind, nbytes in stats.bytes_sent.items()} | {"refreshes": len(stats.refreshes)}


@cache
def ended(engines: tuple[str, ...], world_size: int) -> list[dict[Any, Any]] | AssertionError:
    # Pickled here: torch would pass tensors in memory that the ranks then share.
    try:
        with TemporaryDirectory() as folder:
            return run_ranks(world_size, of_group, engines, pickle.dumps(first_half("bare")), folder)
    except AssertionError as error:  # for every test of the group: it takes half a minute
        return error


def outcomes(engines: tuple[str, ...], world_size: int) -> list[dict[Any, Any]]:
    of_ranks = ended(engines, world_size)
    if isinstance(of_ranks, AssertionError):
        raise of_ranks
    return of_ranks


@cache
def alone(name: str) -> Weights:
    return train("bare", (CASES | SIXTEEN_BITS).get(name, RESUMED))


def check(engine: str, world_size: int, outcome: Any, name: str) -> None:
    kind = CASES[name].net if name in CASES else Net
    expected, initial = alone(name), dict(new_net(torch.float64, kind).named_parameters())
    tolerance = TOLERANCE[torch.float64 if engine in FLOAT64 else torch.float32]
    assert max((expected[key] - initial[key]).abs().max() for key in expected) > 0.05
    for of_rank in outcomes(GROUPS[engine], world_size):
        for key, weight in of_rank[outcome].items():
            torch.testing.assert_close(weight, expected[key], rtol=tolerance, atol=tolerance)


MARKS = {2: [pytest.mark.ranks], 4: [pytest.mark.ranks, pytest.mark.slow]}
WORLDS = [pytest.param(world_size, marks=marks) for world_size, marks in MARKS.items()]
ALL = [pytest.param(*of_one, marks=MARKS[of_one[2]]) for of_one in product(GROUPS, CASES, MARKS) if fits(*of_one)]


@pytest.mark.parametrize(("engine", "name", "world_size"), ALL)
def test_six_steps_are_those_of_one_process(engine: str, name: str, world_size: int) -> None:
    check(engine, world_size, (engine, name), name)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("before", "then"), [pair for pairs in PAIRS.values() for pair in pairs])
def test_a_state_goes_from_one_engine_to_another(before: str, then: str, world_size: int) -> None:
    check(before, world_size, (before, then), "resumed")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("engine", GROUPS)
def test_a_state_of_one_process_loads_on_several(engine: str, world_size: int) -> None:
    check(engine, world_size, (engine, "from one process"), "resumed")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("engine", GROUPS)
def test_a_state_of_several_loads_in_one_process(engine: str, world_size: int) -> None:
    of_ranks = outcomes(GROUPS[engine], world_size)
    tolerance = TOLERANCE[torch.float64 if engine in FLOAT64 else torch.float32]

    for of_rank in of_ranks:
        weights = second_half("bare", *of_rank[engine, "to one process"])
        for key, weight in weights.items():
            torch.testing.assert_close(weight, alone("resumed")[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("engine", GROUPS)
def test_pieces_alone_travel_to_owners_and_back(engine: str, world_size: int) -> None:
    """n weights, P ranks, numbers over all ranks: whole directions are n (P - 1), equal pieces n (P - 1) / P at most.

    Of a flat range that is cut, as ZeRO 1 and 2 cut it, each number travels once at most.
    """
    of_ranks = [of_rank[engine, "sent"] for of_rank in outcomes(GROUPS[engine], world_size)]
    weights = sum(layer.parameters for layer in card_of(Net(), [torch.zeros(2, LENGTH, dtype=torch.int64)]).layers)
    others = world_size - 1
    pieces = weights * others / world_size
    padding = 2 * LAYERS * world_size * others  # a tensor in a message begins at a multiple of 8 bytes

    gradients, directions = (sum(of_rank.get(kind, 0) for of_rank in of_ranks) for kind in ("gradients", "directions"))

    assert all(of_rank["refreshes"] == 0 for of_rank in of_ranks)
    if engine in ("ddp", "zero0"):
        assert gradients <= padding
        assert weights * others <= directions <= weights * others + padding
    elif engine in ("fsdp2", "zero3"):
        assert pieces / 2 <= gradients <= pieces + padding
        assert pieces / 2 <= directions <= pieces + padding
    else:
        assert gradients <= weights + padding
        assert directions <= weights + padding


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ZERO[2:])
def test_a_state_goes_along_with_deepspeeds_own_checkpoint(engine: str) -> None:
    check(engine, 2, ("by DeepSpeed", engine), "resumed")


@pytest.mark.ranks
def test_a_skipped_step_leaves_zeros_for_the_optimizer_behind_a_preconditioner() -> None:
    for of_rank in outcomes(GROUPS["fsdp2"], 2):
        made, largest = of_rank["bad piece alone"]
        assert not made
        assert largest
        assert max(largest) == 0


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "engine"), IN_16_BITS)
def test_16_bits_are_apart_by_their_rounding(name: str, engine: str) -> None:
    for of_rank in outcomes(GROUPS[engine], 2):
        for key, weight in of_rank["16 bits", name, engine].items():
            torch.testing.assert_close(weight, alone(name)[key], rtol=3e-2, atol=3e-2)


@pytest.mark.ranks
@pytest.mark.parametrize("engine", GROUPS)
def test_an_adaptive_schedule_is_that_of_a_bare_model_on_all_ranks(engine: str) -> None:
    of_ranks = outcomes(GROUPS[engine], 2)
    weights, *schedule = of_ranks[0]["adaptive", "bare"]
    tolerance = TOLERANCE[torch.float64 if engine in FLOAT64 else torch.float32]

    for of_rank in of_ranks:
        own, *own_schedule = of_rank["adaptive", engine]
        assert own_schedule == schedule
        for key, weight in own.items():
            torch.testing.assert_close(weight, weights[key], rtol=tolerance, atol=tolerance)


@pytest.mark.ranks
@pytest.mark.parametrize("engine", GROUPS)
def test_local_statistics_give_the_weights_of_a_bare_model_on_as_many_ranks(engine: str) -> None:
    of_ranks = outcomes(GROUPS[engine], 2)
    tolerance = TOLERANCE[torch.float64 if engine in FLOAT64 else torch.float32]

    for of_rank in of_ranks:
        for key, weight in of_rank["local", engine].items():
            torch.testing.assert_close(weight, of_ranks[0]["local", "bare"][key], rtol=tolerance, atol=tolerance)


def test_a_preconditioner_before_sgd_is_ngd() -> None:
    ngd, both = alone("momentum"), alone("preconditioner before SGD")

    for key, weight in both.items():
        torch.testing.assert_close(weight, ngd[key], rtol=1e-13, atol=1e-13)


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ZERO[1:])
def test_a_step_that_overflows_is_skipped_and_the_next_is_right(engine: str) -> None:
    """Held to float64 on the batches that counted: float16's rounding is 5e-4 of a number."""
    for of_rank in outcomes(ZERO, 2):
        outcome = of_rank["overflow", engine]
        steps, skipped, of_engine, skipped_by_engine = outcome["counts"]
        reference = Run("bare", Case({"momentum": 0.0}))
        for number in outcome["applied"]:
            reference.step(number)

        assert skipped == skipped_by_engine > 0
        assert steps == of_engine - skipped_by_engine == len(outcome["applied"]) > 2
        for key, weight in reference.weights().items():
            torch.testing.assert_close(outcome["weights"][key], weight, rtol=2e-2, atol=2e-2)


@pytest.mark.ranks
def test_a_nan_in_the_piece_of_one_rank_is_every_ranks() -> None:
    for of_rank in outcomes(GROUPS["fsdp2"], 2):
        for setting, (message, before, after, later, skipped) in of_rank["bad piece"].items():
            assert skipped == 1
            assert (setting == "raise") == bool(re.search(r"gradient of 'head.weight' is NaN .* on rank 1", message))
            assert all(torch.equal(before[key], after[key]) for key in before)
            assert all(weight.isfinite().all() for weight in later.values())
            assert not torch.equal(later["head.weight"], after["head.weight"])


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "words"),
    {
        "layer_wise": "step_length layer_wise reads whole directions",
        "quadratic_model": "step_length quadratic_model evaluates the loss again",
        "levenberg_marquardt": "damping_rule levenberg_marquardt evaluates the loss again",
        "statistics_fraction": "statistics_fraction with fisher monte_carlo runs the model a second time",
        "loss_reduction": "loss_reduction 'sum' needs the bare model",
        "a part alone": "fully_shard has not sharded 'scale'",
        "hybrid": "on a mesh of 2 dimensions",
        "tensor parallel": "it is a DTensor that no fully_shard has made",
        "foreign": "1 in param_groups are not of the model",
        "scaler": "grad_scaler must be None under fully_shard",
        "dcp": "ShardedState can't hold the pieces of fully_shard",
    }.items(),
)
def test_fully_shard_is_refused_in_words(case: str, words: str) -> None:
    for of_rank in outcomes(GROUPS["fsdp2"], 2):
        assert words in of_rank["refusals", "fsdp2"][case]


OF_DEEPSPEED = {
    "quadratic_model": "evaluate",
    "levenberg_marquardt": "evaluate",
    "loss_reduction": "loss_reduction 'sum' needs the bare model",
    "fisher": "fisher monte_carlo has backward passes of its own, for which ZeRO 3",
    "micro_batches": "micro_batches must be 1, DeepSpeed's gradient_accumulation_steps, got 3",
    "not told": "DeepSpeed owns it; build the optimizer on the engine",
    "step": "call engine.step(), and that alone",
    "preconditioner": "a Preconditioner needs an optimizer after it",
    "clipping": "gradient_clipping must be 0.0, got 1.0",
    "ngd": "NGD takes the place of the optimizer inside DeepSpeed, which is SGD",
    "lr of the inner optimizer": "0.25",
    "layer_wise": "step_length layer_wise reads whole directions",
}


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ZERO)
@pytest.mark.parametrize("case", OF_DEEPSPEED)
def test_deepspeed_is_refused_in_words(engine: str, case: str) -> None:
    for of_rank in outcomes(ZERO, 2):
        message = of_rank["refusals", engine].get(case)
        # ZeRO 0 has whole gradients, and nothing to tell by.
        is_fine = (engine == "zero0" and case in ("not told", "layer_wise")) or (engine != "zero3" and case == "fisher")
        assert is_fine or OF_DEEPSPEED[case] in message


@pytest.mark.ranks
def test_an_engine_that_clips_by_default_is_refused() -> None:
    for of_rank in outcomes(ZERO, 2):
        assert "gradient_clipping must be 0.0, got nothing, which means 1.0" in of_rank["clipped"]

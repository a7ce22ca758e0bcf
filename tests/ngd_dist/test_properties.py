"""What holds for every input: of packing, averaging, placement and the schedule of refreshes."""

from collections.abc import Sequence
from itertools import product
from math import ceil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngd_dist.config import AdaptiveInterval, FixedInterval
from ngd_dist.distributed import RefreshReport
from ngd_dist.distributed.packed_bytes import pack_bytes, packed_nbytes, unpack_bytes
from ngd_dist.distributed.placement import Placement, place
from ngd_dist.factors.codec import Field
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import Form
from ngd_dist.factors.triangle import pack, packed_size, unpack
from ngd_dist.inversion import Ending, Method
from ngd_dist.statistics.staleness import REFRESHED, Schedule, Track, Verdict
from ngd_dist.statistics.statistic import Key, Statistic, StatisticSpec
from tests.support.tensors import F64
from tests.support.work import together

patient = settings(deadline=None)  # how long an example takes says more of the machine than of the code

SEEDS = st.integers(0, 2**16)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
DECAYS = st.one_of(st.just(0.0), st.floats(0.0, 1.0, exclude_max=True))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def symmetric(seed: int, *shape: int) -> Tensor:
    matrix = random(seed, *shape)
    return matrix + matrix.mT


# --- packing ----------------------------------------------------------------------------------------------------------


@patient
@given(batch=st.lists(st.integers(0, 3), max_size=2), n=st.integers(1, 9), seed=SEEDS)
def test_a_batch_of_matrices_is_packed_one_by_one_and_comes_back(batch: list[int], n: int, seed: int) -> None:
    matrices = symmetric(seed, *batch, n, n)

    packed = pack(matrices)

    assert packed.shape == (*batch, packed_size(n))
    assert torch.equal(unpack(packed, n), matrices)
    for one, whole in zip(packed.view(-1, packed_size(n)), matrices.view(-1, n, n), strict=True):
        assert torch.equal(one, whole[torch.ones(n, n).triu().bool()])


@patient
@given(shape=SHAPES, n=st.integers(1, 5), is_symmetric=st.booleans(), seed=SEEDS)
def test_a_statistic_travels_as_as_many_numbers_as_it_says(
    shape: tuple[int, ...], n: int, is_symmetric: bool, seed: int
) -> None:
    whole = (*shape, n, n) if is_symmetric else shape
    form = Dense(whole) if is_symmetric else Form(whole)
    value = symmetric(seed, *whole) if is_symmetric else random(seed, *whole)

    flat = form.flatten(value)

    assert flat.shape == (form.numbers,)
    assert torch.equal(form.expand(flat), value)


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, F64])


@patient
@given(fields=st.lists(st.tuples(st.one_of(SHAPES, st.just(())), DTYPES), max_size=5), seed=SEEDS)
def test_a_parcel_opens_into_what_it_was_made_of(fields: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> None:
    layout = [Field(*field) for field in fields]
    tensors = [random(seed + i, *shape).to(dtype) for i, (shape, dtype) in enumerate(fields)]

    packed = pack_bytes(layout, tensors, torch.device("cpu"))

    assert packed.shape == (packed_nbytes(layout),)
    opened = unpack_bytes(layout, packed)
    assert [part.dtype for part in opened] == [dtype for _, dtype in fields]
    assert all(torch.equal(part, tensor) for part, tensor in zip(opened, tensors, strict=True))


@given(
    verdict=st.sampled_from(Verdict),
    ending=st.sampled_from(Ending),
    rows=st.integers(0, 2**24),
    change=st.one_of(st.just(float("inf")), st.floats(0, 1e30)),
    method=st.one_of(st.none(), st.sampled_from(Method)),
)
def test_a_report_arrives_as_it_was_sent(
    verdict: Verdict, ending: Ending, rows: int, change: float, method: Method | None
) -> None:
    report = RefreshReport(verdict, ending, rows, method, change)

    assert all(number < float("inf") for number in report.numbers())
    assert RefreshReport.parse(report.numbers()) == report


# --- averages ---------------------------------------------------------------------------------------------------------


def folded(values: Sequence[Tensor], decay: float, *, is_symmetric: bool = False) -> Statistic:
    shape = tuple(values[0].shape)
    spec = StatisticSpec("X", Dense(shape) if is_symmetric else Form(shape))
    statistic = Statistic(spec, ema_decay=decay, remembers=True)
    for value in values:
        statistic.fold(value.clone())
    return statistic


@patient
@given(decay=DECAYS, count=st.integers(1, 12), seed=SEEDS)
def test_an_average_is_the_weighted_mean_of_all_values(decay: float, count: int, seed: int) -> None:
    values = [random(seed + i, 4) for i in range(count)]
    shares = [decay ** (count - 1 - i) for i in range(count)]

    statistic = folded(values, decay)

    expected = torch.stack([s * value for s, value in zip(shares, values, strict=True)]).sum(0) / sum(shares)
    assert statistic.value is not None
    torch.testing.assert_close(statistic.value, expected, rtol=1e-13, atol=1e-14)
    assert statistic.weight == pytest.approx(sum(shares), rel=1e-14)


@patient
@given(decay=DECAYS, count=st.integers(1, 6), seed=SEEDS)
def test_a_change_is_that_of_the_value_against_the_last_two_averages(decay: float, count: int, seed: int) -> None:
    values = [random(seed + i, 4) for i in range(count)]
    averages = [folded(values[: i + 1], decay).value for i in range(count)]
    newest = random(seed + count, 4)

    change = folded(values, decay).fold(newest)

    references = [float("inf") if i < 0 else _distance(newest, averages[i]) for i in (count - 1, count - 2)]
    assert [change.to_last, change.to_before] == pytest.approx(references, rel=1e-12)


def _distance(value: Tensor, reference: Tensor | None) -> float:
    assert reference is not None
    return float((value - reference).norm() / min(value.norm(), reference.norm()))


@patient
@given(decay=DECAYS, count=st.integers(1, 5), is_symmetric=st.booleans(), seed=SEEDS)
def test_an_average_that_was_saved_goes_on_bit_for_bit(decay: float, count: int, is_symmetric: bool, seed: int) -> None:
    make = symmetric if is_symmetric else random
    values = [make(seed + i, 2, 3, 3) for i in range(count)]
    statistic = folded(values, decay, is_symmetric=is_symmetric)
    other = folded([make(seed - 1, 2, 3, 3)], decay, is_symmetric=is_symmetric)
    newest = make(seed + count, 2, 3, 3)

    other.load(statistic.state(), torch.device("cpu"))

    assert other.fold(newest) == statistic.fold(newest)
    assert other.value is not None
    assert statistic.value is not None
    assert torch.equal(other.value, statistic.value)
    assert other.weight == statistic.weight


@patient
@given(decay=DECAYS, seed=SEEDS)
def test_an_average_that_is_reset_begins_anew(decay: float, seed: int) -> None:
    values = [random(seed + i, 3) for i in range(3)]
    statistic = folded(values[:2], decay)

    statistic.reset()
    change = statistic.fold(values[2])

    assert [change.to_last, change.to_before] == [float("inf"), float("inf")]
    assert statistic.weight == 1
    assert torch.equal(statistic.value if statistic.value is not None else values[0], values[2])


# --- placement --------------------------------------------------------------------------------------------------------

COSTS = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 100), min_size=1, max_size=7)


def owned_by(placement: Placement, rank: int) -> list[str]:
    return [layer for layer, roles in placement.roles.items() if roles.owner == rank]


def loads(costs: dict[str, int], world_size: int) -> list[int]:
    placement = place(costs, world_size)
    return [sum(costs[layer] for layer in owned_by(placement, rank)) for rank in range(world_size)]


def least_makespan(costs: Sequence[int], world_size: int) -> int:
    """Returns the optimum, by trying every placement."""
    return min(
        max(sum(c for c, rank in zip(costs, ranks, strict=True) if rank == r) for r in range(world_size))
        for ranks in product(range(world_size), repeat=len(costs))
    )


@patient
@given(costs=COSTS, world_size=st.integers(1, 3))
@example(costs=dict(zip("abcde", (3, 3, 2, 2, 2), strict=True)), world_size=2)  # where the bound is met
def test_the_busiest_rank_is_within_grahams_bound_of_the_optimum(costs: dict[str, int], world_size: int) -> None:
    optimum = least_makespan(list(costs.values()), world_size)

    assert max(loads(costs, world_size)) <= (4 / 3 - 1 / (3 * world_size)) * optimum + 1e-9


@given(
    costs=st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 10**9), min_size=1, max_size=60),
    world_size=st.integers(1, 70),
)
def test_every_layer_has_one_owner_and_no_rank_has_much_more_than_its_share(
    costs: dict[str, int], world_size: int
) -> None:
    placement = place(costs, world_size)

    owned = [layer for rank in range(world_size) for layer in owned_by(placement, rank)]
    assert sorted(owned) == sorted(costs)
    assert all(roles.holders == roles.inverters == (roles.owner,) for roles in placement.roles.values())
    # The last layer of the busiest rank went to it when no rank had less than it.
    share = sum(costs.values()) / world_size
    assert max(loads(costs, world_size)) <= share + (1 - 1 / world_size) * max(costs.values()) + 1e-6


@given(costs=COSTS, world_size=st.integers(1, 9), data=st.data())
def test_owners_do_not_depend_on_the_order_of_the_layers(
    costs: dict[str, int], world_size: int, data: st.DataObject
) -> None:
    shuffled = dict(data.draw(st.permutations(list(costs.items()))))

    here, there = place(costs, world_size), place(shuffled, world_size)

    assert dict(here.roles) == dict(there.roles)


@given(costs=COSTS, world_size=st.integers(1, 9), fraction=st.floats(0, 1), below=st.integers(0, 100))
def test_the_wanted_share_of_ranks_holds_a_layer_and_each_other_rank_has_a_supplier(
    costs: dict[str, int], world_size: int, fraction: float, below: int
) -> None:
    placement = place(costs, world_size, fraction=fraction, replicate_below=below)

    for layer, roles in placement.roles.items():
        wanted = world_size if costs[layer] < below else max(1, ceil(fraction * world_size))
        assert len(set(roles.holders)) == len(roles.holders) == wanted
        assert roles.holders[0] == roles.owner
        assert set(roles.inverters) == ({roles.owner} if costs[layer] >= below else set(range(world_size)))
        assert {placement.supplier(layer, rank) for rank in range(world_size)} <= set(roles.holders)


# --- schedule ---------------------------------------------------------------------------------------------------------

KEYS = [Key(layer, name) for layer in ("x", "y", "z") for name in ("A", "G", "S")]
IN_BASIS = [Key(layer, "S") for layer in ("x", "y")]  # z's is measured in the standard basis
PLANNED = [verdict for verdict in Verdict if verdict is not Verdict.MISCOUNTED]  # raises before anything is planned
ROUNDS = st.lists(st.lists(st.sampled_from(PLANNED), min_size=len(KEYS), max_size=len(KEYS)), min_size=1, max_size=30)
STAGGERS = st.sampled_from([0.0, 0.3, 0.5, 1.0])
POLICIES = st.one_of(
    st.builds(FixedInterval, steps=st.integers(1, 9)), st.builds(AdaptiveInterval, max_interval=st.integers(1, 20))
)


def new_schedule(policy: AdaptiveInterval | FixedInterval, stagger: float, cap: float | None = None) -> Schedule:
    costs = together({"x": 5, "y": 3, "z": 1})
    return Schedule(KEYS, costs, policy, stagger=stagger, cap=cap, in_basis=IN_BASIS)


def answers(schedule: Schedule, step: int, verdicts: list[Verdict]) -> dict[Key, Verdict]:
    due = set(schedule.due(step))
    return {key: verdict for key, verdict in zip(KEYS, verdicts, strict=True) if key in due}


@patient
@given(rounds=ROUNDS, stagger=STAGGERS, policy=POLICIES, saved_at=st.integers(0, 30))
def test_ranks_with_the_same_verdicts_and_one_that_loads_plan_the_same(
    rounds: list[list[Verdict]], stagger: float, policy: AdaptiveInterval | FixedInterval, saved_at: int
) -> None:
    mine, theirs = (new_schedule(policy, stagger) for _ in range(2))
    for step, verdicts in enumerate(rounds, start=1):
        if step == saved_at:
            state = theirs.state()
            theirs = new_schedule(policy, stagger)
            theirs.tracks = {key: Track(**track) for key, track in zip(KEYS, state, strict=True)}

        assert mine.due(step) == theirs.due(step)
        found = answers(mine, step, verdicts)
        mine.advance(step, found)
        theirs.advance(step, found)
        assert mine.tracks == theirs.tracks


@patient
@given(rounds=ROUNDS, stagger=STAGGERS, policy=POLICIES)
def test_intervals_stay_within_the_policys_bounds(
    rounds: list[list[Verdict]], stagger: float, policy: AdaptiveInterval | FixedInterval
) -> None:
    schedule = new_schedule(policy, stagger)
    longest = policy.steps if isinstance(policy, FixedInterval) else policy.max_interval
    for step, verdicts in enumerate(rounds, start=1):
        schedule.advance(step, answers(schedule, step, verdicts))

        assert all(1 <= track.interval <= longest for track in schedule.tracks.values())
        assert all(track.refreshed <= step for track in schedule.tracks.values())


@patient
@given(rounds=ROUNDS, stagger=STAGGERS, policy=POLICIES)
def test_a_refresh_is_never_late_and_early_by_no_more_than_staggering_allows(
    rounds: list[list[Verdict]], stagger: float, policy: AdaptiveInterval | FixedInterval
) -> None:
    schedule = new_schedule(policy, stagger, cap=1.0)
    for step, verdicts in enumerate(rounds, start=1):
        before, found = dict(schedule.tracks), answers(schedule, step, verdicts)

        schedule.advance(step, found)

        rebuilt = rebuilt_layers(found)
        for key, track in schedule.tracks.items():
            earliest = latest = before[key].due
            if found.get(key) is Verdict.UNSEEN:
                earliest = latest = step + 1
            elif key in found:
                earliest, latest = step + max(1, ceil(track.interval * (1 - stagger))), step + track.interval
            if key.layer in rebuilt and key in IN_BASIS:
                earliest = latest = step + 1
            elif key.layer in rebuilt:  # a new basis lasts until something has been measured in it
                earliest, latest = max(earliest, step + 2), max(latest, step + 2)
            assert earliest <= track.due <= latest, key


@patient
@given(rounds=ROUNDS, stagger=STAGGERS, policy=POLICIES)
def test_what_is_measured_in_a_basis_is_due_right_after_it_was_made_and_never_with_it(
    rounds: list[list[Verdict]], stagger: float, policy: AdaptiveInterval | FixedInterval
) -> None:
    schedule = new_schedule(policy, stagger)
    have_bases: set[str] = set()
    new_bases: set[str] = set()
    for step, verdicts in enumerate(rounds, start=1):
        found = answers(schedule, step, verdicts)

        measured = {key.layer for key in found if key in IN_BASIS}
        assert new_bases <= measured <= have_bases
        assert not measured & {key.layer for key in found if key not in IN_BASIS}
        schedule.advance(step, found)
        new_bases = rebuilt_layers(found)
        have_bases |= new_bases


def rebuilt_layers(verdicts: dict[Key, Verdict]) -> set[str]:
    """Returns the layers with a statistic in a basis of which another one was refreshed."""
    refreshed = {key.layer for key, verdict in verdicts.items() if key not in IN_BASIS and verdict in REFRESHED}
    return refreshed & {key.layer for key in IN_BASIS}

"""Intervals and staggering are pure functions with known answers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ngd_dist.config import AdaptiveInterval, FixedInterval, NGDConfig
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import Form
from ngd_dist.statistics.staleness import CAP_MARGIN, Schedule, Verdict, adaptive_interval, judge
from ngd_dist.statistics.statistic import Change, Key, Statistic, StatisticSpec
from tests.support.work import apart, together

VERDICTS = st.sampled_from([Verdict.CHANGED, Verdict.MOVING, Verdict.SETTLED])


def measured_intervals(values: list[torch.Tensor], threshold: float = 0.1) -> list[int]:
    """Returns the interval after each refresh of a statistic that takes these values."""
    statistic = Statistic(StatisticSpec("A", Dense(tuple(values[0].shape))), ema_decay=0, remembers=True)
    key = Key("layer", "A")
    schedule = Schedule([key], together({"layer": 1}), AdaptiveInterval(), stagger=0)
    intervals, step = [], 1
    for value in values:
        schedule.advance(step, {key: judge(statistic.fold(value), threshold)})
        intervals.append(schedule.tracks[key].interval)
        step = schedule.tracks[key].due
    return intervals


def test_identical_statistics_are_refreshed_ever_more_rarely() -> None:
    assert measured_intervals([torch.eye(3)] * 9) == [1, 1, 2, 3, 5, 8, 13, 21, 34]


def test_a_jump_halves_the_interval() -> None:
    values = [torch.eye(3)] * 6 + [2 * torch.eye(3), 4 * torch.eye(3), 8 * torch.eye(3), 16 * torch.eye(3)]

    assert measured_intervals(values) == [1, 1, 2, 3, 5, 8, 4, 2, 1, 1]


def test_a_statistic_unlike_the_one_before_keeps_its_interval() -> None:
    # Each step changes by 8%: like the last value, unlike the one before.
    values = [torch.eye(3)] * 5 + [torch.eye(3) * 1.08**i for i in range(1, 4)]

    assert measured_intervals(values) == [1, 1, 2, 3, 5, 8, 8, 8]


def test_intervals_grow_only_if_the_threshold_exceeds_the_sampling_noise_of_two_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 30

    def draws(sigma: float) -> list[torch.Tensor]:
        noise = [torch.randn(n, n, generator=generator) for _ in range(12)]
        # ||noise|| = sigma ||I|| on average: symmetric with n^2 entries of deviation sigma / sqrt(n).
        return [torch.eye(n) + (m + m.T) / 2**0.5 * sigma / n**0.5 for m in noise]

    assert measured_intervals(draws(0.04))[-1] > 20
    assert measured_intervals(draws(0.09))[-1] == 1


def test_a_long_memory_does_not_hide_a_jump() -> None:
    statistic = Statistic(StatisticSpec("A", Dense((3, 3))), ema_decay=0.95, remembers=True)
    for _ in range(20):
        statistic.fold(torch.eye(3))

    assert judge(statistic.fold(2.5 * torch.eye(3)), 0.1) is Verdict.CHANGED


def test_what_gave_nothing_usable_leaves_the_age_and_comes_again_sooner() -> None:
    key = Key("layer", "A")
    schedule = Schedule([key], together({"layer": 1}), AdaptiveInterval(), stagger=0)
    for step, verdict in [(1, Verdict.CHANGED), (2, Verdict.MOVING), (3, Verdict.SETTLED), (5, Verdict.UNUSABLE)]:
        schedule.advance(step, {key: verdict})

    assert schedule.tracks[key].refreshed == 3
    assert schedule.due(6) == [key]


def test_a_nan_is_a_change() -> None:
    assert judge(Change(float("nan"), 0.0), 0.1) is Verdict.CHANGED


@given(verdicts=st.lists(VERDICTS, max_size=40))
def test_intervals_are_at_least_one_and_within_the_bound(verdicts: list[Verdict]) -> None:
    key = Key("layer", "A")
    schedule = Schedule([key], together({"layer": 1}), AdaptiveInterval(max_interval=20), stagger=0.5)
    for verdict in verdicts:
        schedule.advance(schedule.tracks[key].due, {key: verdict})

        assert 1 <= schedule.tracks[key].interval <= 20


def test_adaptive_interval_follows_the_published_rule() -> None:
    assert adaptive_interval(Verdict.CHANGED, 5, 3) == 2
    assert adaptive_interval(Verdict.CHANGED, 1, 1) == 1
    assert adaptive_interval(Verdict.MOVING, 5, 3) == 5
    assert adaptive_interval(Verdict.SETTLED, 5, 3) == 8


def refreshes_per_step(stagger: float, steps: int) -> list[int]:
    layers = [f"layer{i}" for i in range(10)]
    keys = [Key(layer, name) for layer in layers for name in ("A", "G")]
    schedule = Schedule(keys, together(dict.fromkeys(layers, 1)), FixedInterval(steps=10), stagger=stagger)
    counts = []
    for step in range(1, steps + 1):
        due = schedule.due(step)
        counts.append(len({key.layer for key in due}))
        schedule.advance(step, dict.fromkeys(due, Verdict.SETTLED))
    return counts


def test_staggering_spreads_the_layers_over_the_interval() -> None:
    assert max(refreshes_per_step(0.0, 100)[50:]) == 10
    assert max(refreshes_per_step(0.9, 100)[50:]) <= 2


def test_both_factors_of_a_layer_share_a_step() -> None:
    keys = [Key("layer", "A"), Key("layer", "G")]
    schedule = Schedule(keys, together({"layer": 1}), FixedInterval(steps=8), stagger=0.5)
    for _ in range(5):
        step = min(track.due for track in schedule.tracks.values())
        schedule.advance(step, dict.fromkeys(schedule.due(step), Verdict.SETTLED))

        assert len({track.due for track in schedule.tracks.values()}) == 1


@given(
    rounds=st.lists(st.lists(VERDICTS, min_size=6, max_size=6), min_size=1, max_size=25),
    stagger=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_a_refresh_is_never_late_and_every_rank_plans_the_same(rounds: list[list[Verdict]], stagger: float) -> None:
    keys = [Key(layer, name) for layer in ("x", "y", "z") for name in ("A", "G")]
    costs = together({"x": 5, "y": 3, "z": 1})
    mine, theirs = (Schedule(keys, costs, AdaptiveInterval(), stagger=stagger, cap=1.0) for _ in range(2))
    for step, verdicts in enumerate(rounds, start=1):
        answers = dict(zip(keys, verdicts, strict=True))
        for schedule in (mine, theirs):
            schedule.advance(step, answers)

        assert mine.tracks == theirs.tracks
        for track in mine.tracks.values():
            assert step < track.due <= track.refreshed + track.interval


LAYERS = [f"layer{i}" for i in range(6)]
PAIRS = [Key(layer, name) for layer in LAYERS for name in ("A", "G")]
COSTS = dict(zip(LAYERS, (40, 10, 10, 10, 10, 1), strict=True))


def works(schedule: Schedule, steps: int, verdict: Verdict = Verdict.CHANGED) -> list[int]:
    """Returns the work of each step, every statistic of which gives the same verdict."""
    done = []
    for step in range(1, steps + 1):
        due = schedule.due(step)
        done.append(sum(COSTS[key.layer] for key in due))
        schedule.advance(step, dict.fromkeys(due, verdict))
    return done


@pytest.mark.parametrize(("stagger", "cap"), [(0.0, 0.1), (0.0, 0.3), (0.5, None)])
def test_a_step_does_no_more_work_than_the_cap_unless_one_statistic_alone_takes_it(
    stagger: float, cap: float | None
) -> None:
    policy = AdaptiveInterval(max_interval=8)
    done = works(Schedule(PAIRS, apart(COSTS), policy, stagger=stagger, cap=cap), 200, Verdict.SETTLED)

    whole = 2 * sum(COSTS.values())
    bound = whole * (CAP_MARGIN / 8 if cap is None else cap)
    assert max(done[100:]) <= max(bound, *COSTS.values())
    assert done[0] == whole  # what has no value yet does not wait


def test_what_waits_comes_first_in_the_next_step_and_shows_its_age() -> None:
    schedule = Schedule(PAIRS, apart(COSTS), AdaptiveInterval(), stagger=0, cap=0.4)
    schedule.advance(1, dict.fromkeys(PAIRS, Verdict.CHANGED))

    first = schedule.due(2)
    schedule.advance(2, dict.fromkeys(first, Verdict.CHANGED))

    assert first == [Key("layer0", "A")]  # 40 of 162, and G would make it 80: more than 0.4 of the whole
    assert schedule.due(3)[0] == Key("layer0", "G")
    assert schedule.tracks[Key("layer0", "G")].refreshed == 1


@settings(deadline=None)  # a hundred steps of twelve statistics
@given(cap=st.sampled_from([0.01, 0.1, 0.5]), names=st.lists(VERDICTS, min_size=12, max_size=12))
def test_no_statistic_starves_under_a_cap(cap: float, names: list[Verdict]) -> None:
    schedule = Schedule(PAIRS, apart(COSTS), AdaptiveInterval(max_interval=5), stagger=0.5, cap=cap)
    verdicts = dict(zip(PAIRS, names, strict=True))
    for step in range(1, 101):
        schedule.advance(step, {key: verdicts[key] for key in schedule.due(step)})

    # 12 statistics, one a step at the least, and 5 steps of rest.
    assert all(100 - track.refreshed <= 12 + 5 for track in schedule.tracks.values())


def test_a_layer_that_does_not_run_does_not_hold_up_the_others() -> None:
    schedule = Schedule(PAIRS, apart(COSTS), AdaptiveInterval(), stagger=0.5, cap=0.01)
    schedule.advance(1, dict.fromkeys(PAIRS, Verdict.CHANGED))
    for step in range(2, 40):
        due = schedule.due(step)
        asleep = dict.fromkeys(due, Verdict.UNSEEN)
        schedule.advance(step, {k: v if k.layer == "layer0" else Verdict.CHANGED for k, v in asleep.items()})

    assert all(track.refreshed > 20 for key, track in schedule.tracks.items() if key.layer != "layer0")


def test_fixed_intervals_refuse_a_cap_that_they_cannot_keep() -> None:
    NGDConfig(staleness=FixedInterval(steps=10), refresh_cap=0.1)

    with pytest.raises(ValueError, match=r"at least that, got 0\.05"):
        NGDConfig(staleness=FixedInterval(steps=10), refresh_cap=0.05)


def test_work_counts_the_rows_that_were_seen() -> None:
    """A layer with many rows costs more than its inverse: two of them don't meet on a step."""
    keys = [Key(layer, "A") for layer in ("x", "y")]
    schedule = Schedule(keys, lambda _, rows: 1 + sum(rows.values()), FixedInterval(steps=2), stagger=0.5)
    schedule.advance(1, dict.fromkeys(keys, Verdict.CHANGED), dict.fromkeys(keys, 100))

    assert [track.rows for track in schedule.tracks.values()] == [100, 100]
    assert len({track.due for track in schedule.tracks.values()}) == 2


def test_an_unseen_statistic_stays_due() -> None:
    key = Key("layer", "A")
    schedule = Schedule([key], together({"layer": 1}), AdaptiveInterval(), stagger=0.5)

    schedule.advance(1, {key: Verdict.UNSEEN})

    assert schedule.due(2) == [key]


def test_moving_average_weighs_the_first_value_fully() -> None:
    statistic = Statistic(StatisticSpec("F", Form((2,))), ema_decay=0.5, remembers=True)

    statistic.fold(torch.tensor([4.0, 4.0]))
    assert statistic.value is not None
    assert statistic.value.tolist() == [4, 4]
    statistic.fold(torch.tensor([1.0, 1.0]))

    assert torch.allclose(statistic.value, torch.tensor([2.0, 2.0]))  # (0.5 * 4 + 1) / 1.5

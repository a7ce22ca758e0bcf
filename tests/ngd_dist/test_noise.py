"""The sampling noise of statistics, told from replicates: micro-batches of all ranks, or halves of one batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import AdaptiveInterval, FixedInterval, MonteCarlo, Settings
from ngd_dist.distributed.base import CaptureCount
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import Form
from ngd_dist.statistics.staleness import Schedule, judge, threshold_for
from ngd_dist.statistics.statistic import Key, Statistic, StatisticSpec
from tests.support.ranks import run_ranks
from tests.support.tensors import F64
from tests.support.work import together

KEY = Key("layer", "A")


def noisy_intervals(values: list[list[Tensor]], policy: AdaptiveInterval) -> list[int]:
    """Returns the interval after each refresh of a statistic whose values are means of these replicates."""
    statistic = Statistic(StatisticSpec("A", Dense((1, 30, 30))), ema_decay=0, remembers=True)
    schedule = Schedule([KEY], together({"layer": 1}), policy, stagger=0)
    intervals = []
    for replicates in values:
        square = sum(float(replicate.square().sum()) for replicate in replicates) / len(replicates)
        count = CaptureCount(1, 1, len(replicates), {"A": square})
        spread, change = statistic.spread, statistic.fold(sum(replicates) / len(replicates))
        threshold = threshold_for(policy, "A", count.noise("A", change.norm) * spread)
        schedule.advance(schedule.tracks[KEY].due, {KEY: judge(change, threshold)})
        intervals.append(schedule.tracks[KEY].interval)
    return intervals


def halves(count: int, noise: float, size: float = 1.0) -> list[list[Tensor]]:
    """Returns pairs whose means scatter about size * I by the relative noise."""
    generator, n = torch.Generator().manual_seed(0), 30

    def half() -> Tensor:
        entries = torch.randn(1, n, n, generator=generator, dtype=F64)
        # A symmetric matrix of n^2 entries of deviation s has the norm n s, and I has sqrt(n).
        return size * (torch.eye(n, dtype=F64) + (entries + entries.mT) / 2**0.5 * noise * 2**0.5 / n**0.5)

    return [[half(), half()] for _ in range(count)]


def test_intervals_of_a_noisy_statistic_grow_once_the_threshold_knows_its_noise() -> None:
    values = halves(12, noise=0.09)

    assert noisy_intervals(values, AdaptiveInterval(noise_margin=0))[-1] == 1
    assert noisy_intervals(values, AdaptiveInterval())[-1] > 100


@pytest.mark.parametrize("factor", [1.3, 0.75, 10.0, 0.1])
def test_a_real_change_of_a_noisy_statistic_is_caught(factor: float) -> None:
    values = halves(8, noise=0.09) + halves(1, noise=0.09, size=factor)

    *_, before, after = noisy_intervals(values, AdaptiveInterval())

    assert after == before // 2


@pytest.mark.parametrize("factor", [2.01, 0.49])
def test_twice_or_half_the_size_is_a_change_whatever_the_noise(factor: float) -> None:
    statistic = Statistic(StatisticSpec("F", Form((4,))), ema_decay=0, remembers=True)
    statistic.fold(torch.ones(4))

    change = statistic.fold(factor * torch.ones(4))

    assert change.to_last >= threshold_for(AdaptiveInterval(), "F", noise=100.0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_spread_of_a_change_follows_from_the_weights_of_the_average(decay: float, count: int) -> None:
    statistic = Statistic(StatisticSpec("F", Form((1,))), ema_decay=decay, remembers=True)
    for _ in range(count):
        statistic.fold(torch.ones(1, dtype=F64))

    weights = [decay**i for i in range(count)]
    variance = sum(weight**2 for weight in weights) / sum(weights) ** 2
    assert statistic.spread == pytest.approx(math.sqrt(1 + variance), rel=1e-12)


def test_noise_is_the_standard_error_of_the_mean_of_replicates() -> None:
    replicates = torch.randn(5, 40, dtype=F64, generator=torch.Generator().manual_seed(0)) + 1
    mean = replicates.mean(0)

    noise = CaptureCount(1, 5, 5, {"F": float(replicates.square().sum(1).mean())}).noise("F", float(mean.norm()))

    variance = replicates.var(0, correction=1).sum() / 5  # of each entry's mean, summed over entries
    assert noise == pytest.approx(float(variance.sqrt() / mean.norm()), rel=1e-10)


def test_one_replicate_tells_nothing_of_noise() -> None:
    assert CaptureCount(1, 8, 1, {"F": 1.0}).noise("F", 1.0) == math.inf


def build(**settings: object) -> tuple[nn.Module, NGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return model, NGD(model, NGDConfig.model_validate(settings))


def batch(samples: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long()


def noises(optimizer: NGD) -> dict[str, float]:
    return {refresh.statistic: refresh.noise for refresh in optimizer.stats.refreshes}


def second_moment_with_ones(x: Tensor) -> Tensor:
    rows = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return rows.mT @ rows / len(x)


def test_one_batch_in_one_process_is_halved() -> None:
    model, optimizer = build()
    x, y = batch(7)

    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    first, second, whole = (second_moment_with_ones(part) for part in (x[:3], x[3:], x))
    # With shares w of the samples: sum of w ||X_k - X||^2, over K - 1 = 1.
    scatter = (3 * (first - whole).square().sum() + 4 * (second - whole).square().sum()) / 7
    assert noises(optimizer)["0.A"] == pytest.approx(float(scatter.sqrt() / whole.norm()), rel=1e-9)
    assert 0 < noises(optimizer)["2.G"] < 2


def test_micro_batches_are_replicates() -> None:
    model, optimizer = build(micro_batches=3)
    x, y = batch(9)

    for part, labels in zip(x.chunk(3), y.chunk(3), strict=True):
        (F.cross_entropy(model(part), labels) / 3).backward()
    optimizer.step()

    whole = second_moment_with_ones(x)
    scatter = sum((second_moment_with_ones(part) - whole).square().sum() for part in x.chunk(3)) / 3 / 2
    assert noises(optimizer)["0.A"] == pytest.approx(float(scatter.sqrt() / whole.norm()), rel=1e-9)


def test_passes_of_the_fisher_over_one_batch_are_no_replicates_of_their_own() -> None:
    model, optimizer = build(fisher=MonteCarlo(samples=4))
    x, y = batch(8)

    output = model(x)
    optimizer.fisher_backward(output)
    F.cross_entropy(output, y).backward()
    estimates = optimizer._capture.estimates
    optimizer._capture.take()

    assert estimates.counts([Key("0", "A"), Key("0", "G")], [], torch.device("cpu"))[:3].tolist() == [1, 8, 2]


@pytest.mark.parametrize("staleness", [FixedInterval(), AdaptiveInterval(noise_margin=0)])
def test_noise_is_not_measured_where_nothing_reads_it(staleness: Settings) -> None:
    model, optimizer = build(staleness=staleness)
    x, y = batch(8)

    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    assert set(noises(optimizer).values()) == {math.inf}


def test_halves_of_embeddings_and_normalised_rows_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 2)).double()
    measured, plain = NGD(model), NGD(model, NGDConfig(staleness=FixedInterval()))
    tokens = torch.randint(6, (5, 3), generator=torch.Generator().manual_seed(0))

    F.cross_entropy(model(tokens), torch.tensor([0, 1, 0, 1, 1])).backward()

    found, expected = measured._capture.take(), plain._capture.take()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def noise_on_ranks(rank: int, world_size: int, strategy: str) -> dict[str, float]:
    model, optimizer = build(strategy={"kind": strategy})
    x, y = batch(8)
    F.cross_entropy(model(x.chunk(world_size)[rank]), y.chunk(world_size)[rank]).backward()
    optimizer.step()
    return noises(optimizer)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["all_reduce", "owner_sharded"])
def test_two_ranks_find_the_noise_that_the_halves_of_one_find(strategy: str) -> None:
    model, optimizer = build()
    x, y = batch(8)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    # Statistics travel in float64, as the model is.
    for found in run_ranks(2, noise_on_ranks, strategy):
        assert found == pytest.approx(noises(optimizer), rel=1e-9)

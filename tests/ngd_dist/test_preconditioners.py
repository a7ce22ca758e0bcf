"""What every method promises, over the registry and over the shapes that a layer can have.

A new method is tested by being registered: its config class is found, and each test runs on it.
"""

from collections.abc import Mapping
from typing import Any, cast, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.extending.method import Diagonal
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, KFAC, SENG, SINGD, TKFAC, Eva, PreconditionerChoice, Settings
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import Form
from ngd_dist.factors.samples import SampleGradients
from ngd_dist.inversion import Ending
from ngd_dist.layers import LayerBatch
from ngd_dist.preconditioners import Cache, Preconditioner, preconditioner_for
from tests.support.methods import SHIPPED
from tests.support.refreshing import refresh
from tests.support.rows import ForwardRows, GivenRows, random_rows

CHOICES: dict[str, type[Settings]] = {
    choice.model_fields["kind"].default: choice for choice in get_args(get_args(PreconditionerChoice)[0])
}
METHODS: dict[str, Settings] = {
    **{kind: CHOICES[kind]() for kind in SHIPPED},
    "from outside": Diagonal(),
    "kfac exact": KFAC(damping_form="exact"),
    "kfac reduce": KFAC(sharing="reduce"),
    "ekfac reduce": EKFAC(sharing="reduce"),
    "seng implicit": SENG(max_explicit=0),
    "tkfac reduce": TKFAC(sharing="reduce"),
    "eva reduce": Eva(sharing="reduce"),
    "singd like kfac": SINGD(kfac_like=True),
    "singd in blocks": SINGD(structure="block_diagonal", width=2),
    "singd diagonal": SINGD(structure="diagonal"),
    "singd low rank": SINGD(structure="low_rank", width=2, momentum=0),
}
# (B, O, I) and max_dense
SHAPES: dict[str, tuple[tuple[int, int, int], int]] = {
    "one block": ((1, 4, 5), 8192),
    "three blocks": ((3, 4, 5), 8192),
    "diagonal A": ((2, 4, 5), 4),
    "diagonal G": ((2, 5, 4), 4),
    "diagonal A and G": ((2, 4, 5), 3),
}
CASES = [f"{method} | {shape}" for method in METHODS for shape in SHAPES]
CASES += ["unit-wise | scale and shift", "unit-wise | scale", "one-hot inputs | one block"]
DAMPING = 0.03
every_case = pytest.mark.parametrize("case", CASES)


def build(case: str) -> tuple[Preconditioner, tuple[int, int, int]]:
    """Returns the method, and the shape (B, O, I) of the rows it reads."""
    method, shape = case.split(" | ")
    if method == "unit-wise":
        inputs = 2 if shape == "scale and shift" else 1
        # Rows are one normalised input to each unit.
        return preconditioner_for(LayerShape("layer", "unit_wise", inputs, 6), NGDConfig()), (1, 6, 6)
    if method == "one-hot inputs":
        one_hot = LayerShape("layer", "kronecker", 5, 4, has_one_hot_inputs=True)
        return preconditioner_for(one_hot, NGDConfig()), (1, 4, 5)
    (B, O, I), max_dense = SHAPES[shape]  # noqa: E741
    config = NGDConfig.model_validate({"preconditioner": METHODS[method], "max_dense": max_dense})
    return preconditioner_for(LayerShape("layer", "kronecker", I, O, blocks=B), config), (B, O, I)


def rows_of(shape: tuple[int, int, int], kind: type[GivenRows] = GivenRows) -> LayerBatch:
    return random_rows(shape, samples=12, positions=3, kind=kind)


def shape_of(form: Form, samples: int, positions: int = 3) -> tuple[int, ...]:
    """Returns the shape of a tensor of this form that is made of these samples."""
    by_position = (2,) if isinstance(form, SampleGradients) and len(form.shape) == 4 else ()
    lengths = dict.fromkeys(form.sample_dims, samples) | dict.fromkeys(by_position, positions)
    return tuple(lengths.get(dim, length) for dim, length in enumerate(form.shape))


def matrix(form: Form, value: Tensor) -> Tensor:
    """Returns the value, or the matrix that its samples stand for."""
    return form.dense(value) if isinstance(form, SampleGradients) else value


def names(method: Preconditioner, **traits: bool) -> frozenset[str]:
    """Returns the statistics whose spec says so."""
    wanted = traits.items()
    return frozenset(spec.name for spec in method.statistics if all(getattr(spec, k) is v for k, v in wanted))


def estimated(method: Preconditioner, rows: LayerBatch) -> tuple[dict[str, Tensor], Cache]:
    """Returns all statistics, and a cache of all: what is measured in a basis is measured in that of the others."""
    statistics = method.estimate(rows, names(method, in_basis=False), {})
    cache = refreshed(method, statistics, names(method, in_basis=False), None)
    if in_basis := names(method, in_basis=True):
        statistics |= method.estimate(rows, in_basis, {name: cache[name] for name in method.shared})
        cache = refreshed(method, statistics, in_basis, cache)
    return statistics, cache


def refreshed(
    method: Preconditioner,
    statistics: Mapping[str, Tensor],
    fresh: frozenset[str],
    old: Cache | None,
    damping: float = DAMPING,
) -> Cache:
    result = refresh(method, statistics, fresh, damping, old)
    assert result.cache is not None
    assert set(result.endings.values()) <= {Ending.OK}
    return result.cache


def gradient(method: Preconditioner, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(method.shape.gradient, dtype=torch.float64, generator=generator)


def test_every_choice_of_the_configuration_is_registered() -> None:
    assert set(SHIPPED) == set(CHOICES)


@every_case
def test_statistics_have_the_shapes_of_their_specs(case: str) -> None:
    method, shape = build(case)

    statistics, _ = estimated(method, rows_of(shape))

    assert {name: tuple(value.shape) for name, value in statistics.items()} == {
        spec.name: shape_of(spec.form, samples=12) for spec in method.statistics
    }
    for spec in method.statistics:
        value = statistics[spec.name]
        assert value.dtype == torch.float64
        if spec.is_local:  # it does not travel
            continue
        # Not to the bit on every processor: the upper triangle counts.
        torch.testing.assert_close(spec.form.expand(spec.form.flatten(value)), value, rtol=1e-13, atol=1e-13)
        if isinstance(spec.form, Dense):
            torch.testing.assert_close(value, value.mT, rtol=1e-13, atol=1e-13)
            assert torch.equal(spec.form.expand(spec.form.flatten(value)).triu(), value.triu())


@every_case
def test_a_cache_has_the_announced_entries(case: str) -> None:
    method, shape = build(case)

    _, cache = estimated(method, rows_of(shape))

    assert {name: tuple(entry.shape) for name, entry in cache.items()} == {
        name: shape_of(form, samples=12) for name, form in method.entries.items()
    }
    assert set(method.shared) <= set(method.cache_shapes)


@every_case
def test_a_statistic_is_a_mean_over_samples(case: str) -> None:
    method, shape = build(case)
    rows = rows_of(shape)
    twice = GivenRows(*(torch.cat([x, x], 1) for x in (rows.a_BNPI, rows.g_BNPO, rows.slopes_BNPO)))
    once, cache = estimated(method, rows)

    shared = {name: cache[name] for name in method.shared}
    again = method.estimate(cast(LayerBatch, twice), frozenset(once), shared)

    for spec in method.statistics:
        ours, theirs = (matrix(spec.form, of_batch[spec.name]) for of_batch in (again, once))
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@every_case
def test_only_what_is_due_is_estimated(case: str) -> None:
    method, shape = build(case)
    rows = rows_of(shape)
    statistics, cache = estimated(method, rows)
    shared = {name: cache[name] for name in method.shared}

    assert method.estimate(rows, frozenset(), shared) == {}
    for name, value in statistics.items():
        alone = method.estimate(rows, frozenset({name}), shared)
        assert alone.keys() == {name}
        assert torch.equal(alone[name], value)


@pytest.mark.parametrize("case", [case for case in CASES if build(case)[0].shared])
def test_a_statistic_without_its_basis_is_left_out(case: str) -> None:
    method, shape = build(case)

    found = method.estimate(rows_of(shape), names(method), {})

    assert found.keys() == names(method, in_basis=False)


@every_case
def test_the_forward_pass_alone_is_read_where_that_is_promised(case: str) -> None:
    method, shape = build(case)
    forward = names(method, reads_gradients=False)
    rows = rows_of(shape)

    found = method.estimate(rows_of(shape, ForwardRows), forward, {})

    for name, value in method.estimate(rows, forward, {}).items():
        assert torch.equal(found[name], value)


@every_case
def test_a_direction_is_linear_in_the_gradient(case: str) -> None:
    method, shape = build(case)
    _, cache = estimated(method, rows_of(shape))
    x, y = gradient(method, 1), gradient(method, 2)

    together = method.apply(cache, 2 * x - 3 * y)

    assert together.shape == x.shape
    apart = 2 * method.apply(cache, x) - 3 * method.apply(cache, y)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


@every_case
def test_what_is_applied_is_symmetric_and_positive_definite(case: str) -> None:
    method, shape = build(case)
    _, cache = estimated(method, rows_of(shape))
    x, y = gradient(method, 1), gradient(method, 2)

    torch.testing.assert_close(
        torch.sum(y * method.apply(cache, x)), torch.sum(x * method.apply(cache, y)), rtol=1e-11, atol=1e-12
    )
    assert float(torch.sum(x * method.apply(cache, x))) > 0
    assert float(torch.sum(y * method.apply(cache, y))) > 0


@every_case
def test_applying_changes_neither_cache_nor_gradient(case: str) -> None:
    method, shape = build(case)
    _, cache = estimated(method, rows_of(shape))
    grad = gradient(method, 1)
    before = {name: entry.clone() for name, entry in cache.items()}

    method.apply(cache, grad)

    assert torch.equal(grad, gradient(method, 1))
    assert all(torch.equal(cache[name], entry) for name, entry in before.items())


@every_case
def test_a_refresh_leaves_the_statistics_and_the_old_cache_alone(case: str) -> None:
    method, shape = build(case)
    statistics, cache = estimated(method, rows_of(shape))
    before = {name: value.clone() for name, value in (statistics | cache).items()}

    refresh(method, statistics, frozenset(statistics), 10 * DAMPING, cache)

    assert all(torch.equal((statistics | cache)[name], value) for name, value in before.items())


@every_case
def test_a_failed_refresh_keeps_the_old_part_and_says_so(case: str) -> None:
    method, shape = build(case)
    statistics, cache = estimated(method, rows_of(shape))

    for name, value in statistics.items():
        poisoned = statistics | {name: torch.full_like(value, float("nan"))}
        result = refresh(method, poisoned, frozenset({name}), DAMPING, cache)

        assert result.endings[name] is not Ending.OK
        assert result.endings[name].advice
        assert result.cache is not None
        assert result.cache.keys() == cache.keys()
        assert all(bool(torch.isfinite(entry).all()) for entry in result.cache.values())
        if name in cache:
            assert torch.equal(result.cache[name], cache[name])


@every_case
def test_without_an_old_part_a_failed_refresh_gives_no_cache(case: str) -> None:
    method, shape = build(case)
    statistics, _ = estimated(method, rows_of(shape))
    standard = {name: statistics[name] for name in names(method, in_basis=False)}

    for name, value in standard.items():
        poisoned = standard | {name: torch.full_like(value, float("nan"))}
        result = refresh(method, poisoned, frozenset(standard), DAMPING, None)

        assert result.cache is None
        assert result.endings[name] is not Ending.OK


@every_case
def test_a_new_damping_gives_what_a_whole_rebuild_gives(case: str) -> None:
    if case.startswith("singd"):
        pytest.skip("its roots have a past: a new damping counts from their next step on")
    method, shape = build(case)
    statistics, cache = estimated(method, rows_of(shape))
    grad = gradient(method, 1)

    damped = refreshed(method, statistics, frozenset(), cache, 10 * DAMPING)

    anew = refreshed(method, statistics, names(method, in_basis=False), None, 10 * DAMPING)
    if in_basis := names(method, in_basis=True):
        anew = refreshed(method, statistics, in_basis, anew, 10 * DAMPING)
    torch.testing.assert_close(method.apply(damped, grad), method.apply(anew, grad), rtol=1e-12, atol=1e-12)


PART_BY_PART = [case for case in CASES if build(case)[0].flops_by_statistic]


@pytest.mark.parametrize("case", PART_BY_PART)
def test_a_new_statistic_makes_its_own_part_of_the_cache_anew_and_leaves_the_others(case: str) -> None:
    method, shape = build(case)
    statistics, cache = estimated(method, rows_of(shape))
    scaled = {name: 3 * value for name, value in statistics.items()}
    whole = refreshed(method, scaled, names(method), cache)

    for name in method.flops_by_statistic:
        one = refreshed(method, scaled, frozenset({name}), cache)

        torch.testing.assert_close(one[name], whole[name], rtol=1e-12, atol=1e-12)
        assert all(one[other] is cache[other] for other in method.flops_by_statistic if other != name)


@pytest.mark.parametrize("case", PART_BY_PART)
def test_work_of_a_cache_that_is_made_part_by_part_is_that_of_its_parts(case: str) -> None:
    method, _ = build(case)
    rows = dict.fromkeys(method.flops_by_statistic, 100)

    assert method.work(rows) == sum(method.work({name: 100}) for name in rows)
    assert method.refresh_flops() == sum(method.flops_by_statistic.values())


TIED = [case for case in CASES if case.startswith("kfac") and not build(case)[0].flops_by_statistic]


@pytest.mark.parametrize("case", TIED)
def test_a_factor_that_vanishes_while_the_other_stays_leaves_the_damping_whole(case: str) -> None:
    method, shape = build(case)
    statistics, cache = estimated(method, rows_of(shape))
    late = statistics | {"G": 1e-6 * statistics["G"]}

    kept = refreshed(method, late, frozenset({"G"}), cache)

    anew, grad = refreshed(method, late, names(method), None), gradient(method, seed=0)
    torch.testing.assert_close(method.apply(kept, grad), method.apply(anew, grad), rtol=1e-9, atol=1e-12)


@every_case
def test_much_damping_leaves_the_gradient_over_damping(case: str) -> None:
    if case.startswith(("kfac |", "kfac reduce", "one-hot", "tkfac")):
        pytest.skip("the split adds sqrt(damping) to each factor: the product keeps terms in sqrt(damping)")
    if case.startswith("singd"):
        pytest.skip("its roots have a past: a new damping counts from their next step on")
    if case.startswith("lngd"):
        pytest.skip("its damping is its own")
    method, shape = build(case)
    statistics, cache = estimated(method, rows_of(shape))
    largest, grad = 1e12, gradient(method, 1)

    damped = refreshed(method, statistics, frozenset(), cache, largest)

    # What is left is of the size of F / damping; no statistic here reaches 1e6.
    torch.testing.assert_close(largest * method.apply(damped, grad), grad, rtol=1e-5, atol=1e-5)


@every_case
def test_costs_are_positive(case: str) -> None:
    method, _ = build(case)

    assert method.refresh_flops() > 0
    assert method.apply_flops() > 0


def test_many_narrow_rows_cost_the_passes_over_them() -> None:
    """A channel's products with itself are few beside reading it: as on ResNet-20, where BatchNorm's F costs 10 ms."""
    config = NGDConfig()
    norm = preconditioner_for(LayerShape("bn", "unit_wise", 2, 16), config)
    conv = preconditioner_for(LayerShape("conv", "kronecker", 576, 64), config)

    ratio = norm.work({"F": 65536}) / conv.work({"A": 4096})

    assert 0.1 < ratio < 0.5  # measured: 9.7 ms to 29 ms and an inverse


@pytest.mark.parametrize("kind", SHIPPED)
def test_every_method_trains_by_one_line_of_config(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4))
    settings: dict[str, Any] = {"preconditioner": {"kind": kind}}
    optimizer = NGD(model, NGDConfig.model_validate(settings))
    x = torch.randn(64, 8)
    y = (x[:, :4] + x[:, 4:]).argmax(1)

    losses = []
    for _ in range(15):  # few: lr is for a schedule that lets it fall, and this batch is soon fit
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.stats.failed_inversions == 0

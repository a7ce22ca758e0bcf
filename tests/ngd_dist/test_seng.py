"""SENG is the dense solution with the gradients of a batch's samples in float64, and its sketches are what they say."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import SENG, Exact, FixedInterval, MonteCarlo
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import Replicate
from ngd_dist.factors.samples import Explicit, Implicit, SampleGradients, truncated
from ngd_dist.inversion import Ending
from ngd_dist.preconditioners import Cache, Preconditioner, preconditioner_for
from ngd_dist.statistics.statistic import Key
from tests.reference.seng import direction, fisher
from tests.support.refreshing import refresh
from tests.support.rows import random_rows
from tests.support.seng_steps import DAMPING, EXACT, config, directions, expected, net
from tests.support.tensors import F64

BLOCKS, OUTPUTS, INPUTS, SAMPLES, POSITIONS = 2, 6, 9, 7, 5
FORMS: dict[str, Any] = {"explicit": Explicit, "implicit": Implicit}
every_form = pytest.mark.parametrize("kind", FORMS)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, way in ours.items():
        torch.testing.assert_close(way, theirs[name], rtol=tolerance, atol=tolerance)


def method(choice: SENG, outputs: int = OUTPUTS, inputs: int = INPUTS, blocks: int = BLOCKS) -> Preconditioner:
    return preconditioner_for(
        LayerShape("layer", "kronecker", inputs, outputs, blocks), NGDConfig(preconditioner=choice)
    )


def rows(seed: int = 0, positions: int = POSITIONS, draw: int = 0) -> Any:
    given: Any = random_rows((BLOCKS, OUTPUTS, INPUTS), samples=SAMPLES, positions=positions, seed=seed)
    for name in ("a_BNPI", "g_BNPO"):  # a condition number of some 100: rounding is that many times 1e-16
        setattr(given, name, getattr(given, name) / getattr(given, name).abs().max())
    given.replicate = Replicate(seed=draw)
    return given


def gradients(given: Any) -> Tensor:
    return (given.g_BNPO.mT @ given.a_BNPI).transpose(0, 1)


def cached(of: Preconditioner, given: Any, damping: float = DAMPING) -> Cache:
    statistics = of.estimate(given, frozenset("U"), {})
    cache = refresh(of, statistics, frozenset("U"), damping, None).cache
    assert cache is not None
    return cache


def gradient(seed: int = 1) -> Tensor:
    return torch.randn(BLOCKS, OUTPUTS, INPUTS, dtype=F64, generator=torch.Generator().manual_seed(seed))


# --- the exact method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("kind", EXACT)
def test_a_step_is_the_dense_solution(kind: str, passes: int) -> None:
    model = net()
    optimizer = NGD(model, config(EXACT[kind], micro_batches=passes))

    for step in range(2):
        exact = expected(model, step=step)
        close(directions(model, optimizer, step, passes=passes), exact)

    assert optimizer.stats.failed_inversions == 0


def test_micro_batches_of_unknown_number_are_those_of_the_whole() -> None:
    model = net()
    optimizer, exact = NGD(model, config(SENG(), micro_batches="any")), expected(model)

    close(directions(model, optimizer, passes=3), exact)


def test_small_layers_are_exact_under_the_default() -> None:
    model = net()
    exact = expected(model)

    close(directions(model, NGD(model, config(SENG()))), exact)


@every_form
def test_the_identity_is_the_dense_solution_of_each_block(kind: str) -> None:
    given, grad = rows(), gradient()

    found = method(EXACT[kind]).apply(cached(method(EXACT[kind]), given), grad)

    torch.testing.assert_close(found, direction(grad, gradients(given), DAMPING), rtol=1e-12, atol=1e-12)


@every_form
def test_float32_is_as_near_as_its_condition_number_allows(kind: str) -> None:
    given, grad = rows(), gradient()
    exact = direction(grad, gradients(given), DAMPING)
    for name in ("a_BNPI", "g_BNPO"):
        setattr(given, name, getattr(given, name).float())

    found = method(EXACT[kind]).apply(cached(method(EXACT[kind]), given), grad.float())

    condition = float(torch.linalg.matrix_norm(fisher(gradients(given).double()), 2).max()) / DAMPING
    assert torch.linalg.vector_norm(found - exact) < 6e-8 * condition * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("fisher", [Exact(), MonteCarlo(), MonteCarlo(samples=3)], ids=lambda f: f.kind)
def test_passes_of_a_models_fisher_make_up_one_u(fisher: Any) -> None:
    model = nn.Linear(4, 3).double()
    optimizer = NGD(model, config(EXACT["explicit"], fisher=fisher))
    x = torch.randn(8, 4, dtype=F64)

    output = model(x)
    optimizer.fisher_backward(output)
    nn.functional.cross_entropy(output, torch.zeros(8, dtype=torch.int64)).backward()

    U = optimizer._capture.take()[Key("", "U")]
    if fisher.kind == "exact":
        p = torch.softmax(output.detach(), -1)
        rows = torch.cat([x, torch.ones(8, 1, dtype=F64)], 1)
        hessian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        block = torch.einsum("nop,ni,nj->oipj", hessian, rows, rows).reshape(15, 15) / 8
        torch.testing.assert_close(Explicit.of(1, 3, 5).dense(U)[0], block, rtol=1e-12, atol=1e-14)
    assert U.shape[1] == 8 * (3 if fisher.kind == "exact" else fisher.samples)
    optimizer.step()


def test_other_layers_keep_their_own_blocks() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3))

    table = NGD(model, NGDConfig(preconditioner=SENG())).explain()

    for words in ("Embedding, KFAC", "LayerNorm, UnitWise", "Linear, SENG", "U Nx21"):
        assert words in table


def test_texts_of_two_lengths_are_samples_side_by_side() -> None:
    form = Implicit.of(BLOCKS, OUTPUTS, INPUTS)
    short, long = (form.of_rows(r.a_BNPI, r.g_BNPO, Replicate()) for r in (rows(positions=2), rows(positions=4)))

    both = form.plus(short, long)

    torch.testing.assert_close(form.dense(both), form.dense(short) + form.dense(long), rtol=1e-13, atol=1e-13)


def test_samples_of_one_position_are_factors_and_exact_without_a_sketch() -> None:
    given, grad = rows(positions=1), gradient()
    seng, sketched = method(SENG()), method(SENG(q=2))

    cache, of_sketched = cached(seng, given), cached(sketched, given)

    assert cache["U"].shape == (BLOCKS, SAMPLES, 1, INPUTS + OUTPUTS)
    assert "sketch" not in of_sketched
    exact = direction(grad, gradients(given), DAMPING)
    for of, its_cache in ((seng, cache), (sketched, of_sketched)):
        torch.testing.assert_close(of.apply(its_cache, grad), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_draw", [False, True])
def test_micro_batches_of_one_position_and_of_several_are_side_by_side(has_draw: bool) -> None:
    form = Explicit.of(BLOCKS, OUTPUTS, INPUTS, has_draw=has_draw)
    one, several = (form.of_rows(r.a_BNPI, r.g_BNPO, Replicate(seed=8)) for r in (rows(positions=1), rows(positions=3)))
    assert (one.ndim, several.ndim) == (4, 3)

    both = form.plus(one, several)

    torch.testing.assert_close(form.dense(both), form.dense(one) + form.dense(several), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(form.dense(form.times(one, 3.0)), 3 * form.dense(one))
    distance = torch.linalg.vector_norm(form.dense(one) - form.dense(several))
    torch.testing.assert_close(form.distance(one, several), distance)
    assert not has_draw or form.draw(both) == form.draw(one) == 8


# --- the forms --------------------------------------------------------------------------------------------------------


@every_form
def test_a_form_measures_the_matrix_that_it_stands_for(kind: str) -> None:
    form: SampleGradients = FORMS[kind].of(BLOCKS, OUTPUTS, INPUTS, has_draw=True)
    one, two = (form.of_rows(r.a_BNPI, r.g_BNPO, r.replicate) for r in (rows(0, draw=3), rows(1, draw=9)))
    dense, other = form.dense(one), form.dense(two)

    torch.testing.assert_close(dense, fisher(gradients(rows())), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(form.norm(one), torch.linalg.vector_norm(dense))
    torch.testing.assert_close(form.distance(one, two), torch.linalg.vector_norm(dense - other))
    torch.testing.assert_close(form.dense(form.times(one, 3.0)), 3 * dense)
    torch.testing.assert_close(form.dense(form.times(one, torch.tensor(3.0, dtype=F64))), 3 * dense)
    torch.testing.assert_close(form.dense(form.averaged(one, two, 0.25, reuses=False)), 0.75 * dense + 0.25 * other)
    assert (form.draw(one), form.draw(form.times(two, 3.0)), form.draw(form.plus(two, one))) == (3, 9, 9)
    assert form.recalled(form.remembered(one)) is one


def test_products_of_many_samples_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Implicit.of(BLOCKS, OUTPUTS, INPUTS)
    U = form.of_rows(rows().a_BNPI, rows().g_BNPO, Replicate())
    whole = form.products(U, U)

    monkeypatch.setattr("ngd_dist.factors.samples.MAX_PRODUCTS", 3 * BLOCKS * SAMPLES * POSITIONS**2)

    torch.testing.assert_close(form.products(U, U), whole, rtol=1e-14, atol=1e-14)


# --- the cut to a rank ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_sample_is_cut_to_its_largest_output_gradients(rank: int) -> None:
    given = rows()
    V, S, Wt = torch.linalg.svd(given.g_BNPO, full_matrices=False)
    best = (V[..., :rank] * S[..., None, :rank]) @ Wt[..., :rank, :]

    a, g = truncated(given.a_BNPI, given.g_BNPO, rank)

    assert a.shape[2] == g.shape[2] == rank
    torch.testing.assert_close(g.mT @ a, best.mT @ given.a_BNPI, rtol=1e-12, atol=1e-12)


def test_a_cut_to_all_directions_is_exact() -> None:
    given, grad = rows(), gradient()
    assert min(POSITIONS, OUTPUTS) == POSITIONS

    whole, cut = (method(SENG(q=None, r=r, max_explicit=0)) for r in (None, POSITIONS))
    narrow = random_rows((1, 2, 9), samples=4, positions=8)
    a, g = truncated(narrow.a_BNPI, narrow.g_BNPO, 3)

    torch.testing.assert_close(cut.apply(cached(cut, given), grad), whole.apply(cached(whole, given), grad))
    assert g.shape == (1, 4, 2, 2)  # two outputs have two directions
    torch.testing.assert_close(g.mT @ a, narrow.g_BNPO.mT @ narrow.a_BNPI, rtol=1e-12, atol=1e-12)


def test_a_sample_that_is_not_finite_raises_nothing_and_is_seen() -> None:
    given = rows()
    given.g_BNPO[0, 2, 1, 0] = float("inf")

    U = method(SENG(r=2, max_explicit=0)).estimate(given, frozenset("U"), {})["U"]

    assert not bool(U[0, 2].isfinite().all())
    assert bool(U[1].isfinite().all())
    assert bool(U[0, [0, 1, 3, 4, 5, 6]].isfinite().all())


# --- sketches ---------------------------------------------------------------------------------------------------------

SKETCHED = {"explicit": SENG(q=3), "implicit": SENG(q=4, r=None, max_explicit=0)}


@every_form
@pytest.mark.parametrize("scale", ["unbiased", "published"])
def test_sketched_products_have_the_exact_ones_for_their_mean(kind: str, scale: str) -> None:
    """Published ones have d / k times them: 54 / 9, and (9 / 4) (6 / 4)."""
    seng, draws = method(SKETCHED[kind].model_copy(update={"scale": scale})), 3000
    grad, exact = gradient(), FORMS[kind].of(BLOCKS, OUTPUTS, INPUTS)
    U = exact.of_rows(rows().a_BNPI, rows().g_BNPO, Replicate())
    form: Any = seng.entries["sketch"]

    grams, products = [], []
    for draw in range(draws):
        cache = cached(seng, rows(draw=draw))
        grams.append(form.products(cache["sketch"], cache["sketch"]))
        entries = seng._form.entries(grad, cache["places"], form) * seng._scale**0.5  # type: ignore[attr-defined]
        products.append(form.along(cache["sketch"], entries))

    ratio = 1 if scale == "unbiased" else {"explicit": 6, "implicit": 27 / 8}[kind]
    for found, mean in ((grams, exact.products(U, U)), (products, exact.along(U, grad))):
        stacked = torch.stack(found)
        error = stacked.std(0) / draws**0.5
        assert float(((stacked.mean(0) - ratio * mean).abs() / error).max()) < 5


@every_form
def test_a_sketched_direction_is_the_formula_with_the_drawn_entries(kind: str) -> None:
    seng, given, grad = method(SKETCHED[kind]), rows(draw=11), gradient()
    cache = cached(seng, given)
    U = gradients(given).transpose(0, 1).flatten(2) / SAMPLES**0.5
    places = cache["places"].long()
    kept = torch.zeros(OUTPUTS, INPUTS, dtype=torch.bool)
    if kind == "explicit":
        kept.view(-1)[places] = True
    else:
        kept[places[4:].unsqueeze(1), places[:4].unsqueeze(0)] = True
    some = U[..., kept.flatten()] * (OUTPUTS * INPUTS / int(kept.sum())) ** 0.5
    of_grad = grad.flatten(1)[:, kept.flatten()] * (OUTPUTS * INPUTS / int(kept.sum())) ** 0.5

    damped = some @ some.mT + DAMPING * torch.eye(SAMPLES, dtype=F64)
    v = torch.linalg.solve(damped, (some @ of_grad.unsqueeze(-1)).squeeze(-1))
    exact = (grad - (v.unsqueeze(1) @ U).view_as(grad)) / DAMPING

    assert int(kept.sum()) == {"explicit": 9, "implicit": 16}[kind]
    torch.testing.assert_close(seng.apply(cache, grad), exact, rtol=1e-11, atol=1e-11)


@every_form
def test_the_same_seed_draws_the_same_entries_and_another_step_or_seed_others(kind: str) -> None:
    def places(choice: SENG, draw: int) -> Tensor:
        return cached(method(choice), rows(draw=draw))["places"]

    once, again = places(SKETCHED[kind], 5), places(SKETCHED[kind], 5)

    assert torch.equal(once, again)
    assert not torch.equal(once, places(SKETCHED[kind], 6))
    assert not torch.equal(once, places(SKETCHED[kind].model_copy(update={"seed": 1}), 5))


def test_another_damping_keeps_the_drawn_entries() -> None:
    seng = method(SKETCHED["explicit"])
    statistics = seng.estimate(rows(draw=4), frozenset("U"), {})
    old = refresh(seng, statistics, frozenset("U"), DAMPING, None).cache

    damped = refresh(seng, statistics, frozenset(), 10 * DAMPING, old).cache

    assert old is not None
    assert damped is not None
    assert torch.equal(old["sketch"], damped["sketch"])


def test_a_sketch_of_one_side_keeps_all_of_the_other() -> None:
    seng = method(SENG(q=7, r=None, max_explicit=0))

    assert seng.cache_shapes["sketch"] == (BLOCKS, 1, 1, 7 + OUTPUTS)


@pytest.mark.parametrize("choice", [SENG(q=8), SENG(q=9, max_explicit=0)], ids=["explicit", "implicit"])
def test_a_sketch_of_all_entries_is_none(choice: SENG) -> None:
    assert "sketch" not in method(choice).entries


def test_of_sums_is_the_authors_product() -> None:
    given, grad = rows(), gradient()
    seng = method(EXACT["implicit"].model_copy(update={"product": "of_sums"}))
    cache = cached(seng, given)

    found = seng.apply(cache, grad)

    a, g = given.a_BNPI, given.g_BNPO / SAMPLES**0.5
    U = gradients(given).transpose(0, 1).flatten(2) / SAMPLES**0.5
    v = (cache["inverse"] @ (U @ grad.flatten(1).unsqueeze(-1))).squeeze(-1)
    roots = v.abs().sqrt()
    of_g = torch.einsum("bn,bnpo->bpo", roots, g)
    of_a = torch.einsum("bn,bnpi->bpi", v / roots.sum(1, keepdim=True), a)
    torch.testing.assert_close(found, (grad - of_g.mT @ of_a) / DAMPING, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, direction(grad, gradients(given), DAMPING), rtol=0.1)


def test_a_sketched_run_draws_anew_at_each_refresh_and_resumes_to_the_bit() -> None:
    def run(model: nn.Module, optimizer: NGD, steps: range) -> list[Tensor]:
        drawn = []
        for step in steps:
            directions(model, optimizer, step)
            cache = optimizer._curvature.caches["mixed"]
            assert cache is not None
            drawn.append(cache["places"])
        return drawn

    method = SENG(q=3)
    model, twin = net(), net()
    optimizer, other = (NGD(m, config(method, lr=0.1)) for m in (model, twin))
    first = run(model, optimizer, range(2))
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())

    later, resumed = run(model, optimizer, range(2, 4)), run(twin, other, range(2, 4))

    assert all(torch.equal(a, b) for a, b in zip(later, resumed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not any(torch.equal(one, two) for one, two in zip([*first, *later], [*first, *later][1:], strict=False))


# --- failures and settings --------------------------------------------------------------------------------------------


@every_form
def test_a_failed_inversion_keeps_the_old_cache(kind: str) -> None:
    seng = method(SKETCHED[kind])
    statistics = seng.estimate(rows(), frozenset("U"), {})
    old = cached(seng, rows())

    result = refresh(seng, {"U": torch.full_like(statistics["U"], torch.nan)}, frozenset("U"), DAMPING, old)

    assert result.endings == {"U": Ending.NON_FINITE}
    assert result.cache is old


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ema_decay": 0.5}, "gradients of the newest batch alone: leave out ema_decay 0.5"),
        ({"inverse_dtype": "float16"}, "leave out inverse_dtype float16"),
        ({"preconditioner": {"kind": "seng", "q": None, "seed": 3}}, "leave out seed, or set q"),
        ({"preconditioner": {"kind": "seng", "q": None, "scale": "published"}}, "leave out scale, or set q"),
        ({"preconditioner": {"kind": "seng", "q": 0}}, "greater than or equal to 1"),
        ({"preconditioner": {"kind": "seng", "r": 0}}, "greater than or equal to 1"),
        ({"preconditioner": {"kind": "seng", "max_explicit": -1}}, "greater than or equal to 0"),
    ],
)
def test_settings_that_it_would_ignore_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        NGDConfig.model_validate({"preconditioner": {"kind": "seng"}} | settings)


def test_a_choice_that_was_written_out_is_read_again() -> None:
    written = NGDConfig(preconditioner=SENG(q=None), staleness=FixedInterval(steps=200)).model_dump(mode="json")

    assert NGDConfig.model_validate(written).preconditioner == SENG(q=None)

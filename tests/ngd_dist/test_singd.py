"""SINGD's roots equal dense ones that move by the formula, follow the inverse, and keep to their structure."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ngd_dist import NGDConfig
from ngd_dist.config import SINGD
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.kronecker import pi_split
from ngd_dist.inversion import Ending
from ngd_dist.preconditioners import Cache, preconditioner_for
from ngd_dist.preconditioners.singd import SINGD as Method
from tests.reference.singd import ema, moved, projected
from tests.support.refreshing import refresh
from tests.support.rows import random_rows
from tests.support.tensors import F64

BOTH = frozenset({"A", "G"})
SHAPE = (2, 4, 7)
STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "block_diagonal": {"width": 3},  # neither 4 nor 7 is a multiple
    "diagonal": {},
    "low_rank": {"width": 2},
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def method_of(shape: tuple[int, int, int] = SHAPE, max_dense: int = 8192, **settings: Any) -> Method:
    B, O, I = shape  # noqa: E741
    config = NGDConfig.model_validate({"preconditioner": {"kind": "singd", **settings}, "max_dense": max_dense})
    method = preconditioner_for(LayerShape("layer", "kronecker", I, O, blocks=B), config)
    assert isinstance(method, Method)
    return method


def statistics_of(method: Method, seed: int = 0, size: float = 1.0) -> dict[str, Tensor]:
    B, O, I = method.shape.gradient  # noqa: E741
    found = method.estimate(random_rows((B, O, I), samples=40, positions=3, seed=seed), BOTH, {})
    return {name: size * value for name, value in found.items()}


def refreshed(method: Method, statistics: dict[str, Tensor], damping: float, old: Cache | None = None) -> Cache:
    result = refresh(method, statistics, BOTH, damping, old)
    assert result.cache is not None
    assert set(result.endings.values()) == {Ending.OK}
    return result.cache


def inverse_of(method: Method, cache: Cache) -> tuple[Tensor, Tensor]:
    """Returns K K^T [B, I, I] and C C^T [B, O, O]."""
    B, O, I = method.shape.gradient  # noqa: E741
    A, G = method._structures["A"], method._structures["G"]
    right, left = (torch.eye(n, dtype=F64).expand(B, -1, -1) for n in (I, O))
    return A.right(right, cache["K"]), G.left(cache["C"], left)


@every_structure
def test_statistics_are_the_parts_of_kfacs_factors_that_the_structure_needs(structure: str) -> None:
    settings = STRUCTURES[structure]
    dense, method = method_of(), method_of(structure=structure, **settings)
    whole, found = statistics_of(dense), statistics_of(method)

    for name, form in method._structures.items():
        exact, ours = whole[name].squeeze(1), form.dense(found[name])
        for b in range(2):
            kept = projected(torch.ones_like(exact[b]), structure, settings.get("width", 0)) > 0
            torch.testing.assert_close(ours[b], exact[b] * (kept | kept.T), rtol=1e-12, atol=1e-13)


@every_structure
def test_roots_move_as_dense_ones_that_are_projected(structure: str) -> None:
    settings = STRUCTURES[structure]
    method = method_of(structure=structure, rate=0.1, momentum=0, **settings)
    statistics = statistics_of(method)
    whole = {name: value.squeeze(1) for name, value in statistics_of(method_of()).items()}
    # So much damping keeps m below 1, where no bound shortens a step.
    damping, mean = 30.0, {n: f.mean_eigenvalue(statistics[n]) for n, f in method._structures.items()}
    split = dict(zip(("A", "G"), pi_split(mean["A"], mean["G"], damping), strict=True))
    cache: Cache | None = None
    first = {n: (mean[n] + split[n]).rsqrt().view(-1, 1, 1) * torch.eye(whole[n].shape[-1], dtype=F64) for n in whole}
    roots = [(first["A"][b], first["G"][b]) for b in range(2)]

    for _ in range(3):
        cache = refreshed(method, statistics, damping, cache)
        for b, (K, C) in enumerate(roots):
            factors, width = (whole["A"][b], whole["G"][b]), settings.get("width", 0)
            roots[b] = moved(K, C, *factors, damping=damping, rate=0.1, structure=structure, width=width)

    assert cache is not None
    ours = inverse_of(method, cache)
    for b, (K, C) in enumerate(roots):
        torch.testing.assert_close(ours[0][b], K @ K.T, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(ours[1][b], C @ C.T, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("rate", "expected"), [(0.1, 8e-2), (0.01, 8e-3), (0.001, 8e-4)])
def test_roots_follow_the_averaged_inverse_to_first_order(rate: float, expected: float) -> None:
    width = 10
    method = method_of((1, width, width), kfac_like=True, rate=rate, momentum=0)
    generator = torch.Generator().manual_seed(0)
    cache: Cache | None = None
    S = torch.zeros(())

    for step in range(round(3 / rate)):
        rows, identity = torch.randn(width, width, dtype=F64, generator=generator), torch.eye(width, dtype=F64)
        A = rows.mT @ rows / width
        statistics = {"A": A.view(1, 1, width, width), "G": identity.view(1, 1, width, width)}
        share = float(pi_split(A.trace().view(1) / width, torch.ones(1, dtype=F64), 0.01)[0])
        if step == 0:
            S = (A.trace() / width + share) * identity
        S = ema(S, A, share, rate)
        cache = refreshed(method, statistics, 0.01, cache)

    assert cache is not None
    exact = torch.linalg.inv(S)
    error = float((inverse_of(method, cache)[0][0] - exact).norm() / exact.norm())
    assert expected / 2 < error < 2 * expected


@every_structure
def test_roots_of_diagonal_factors_are_those_of_the_dense_structure(structure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {
        "A": torch.rand(2, 7, dtype=F64, generator=generator),
        "G": torch.rand(2, 4, dtype=F64, generator=generator),
    }
    caches: list[Cache | None] = [None, None]
    methods = [method_of(), method_of(structure=structure, **STRUCTURES[structure])]
    given = [{n: part_of(m, n, torch.diag_embed(factors[n])) for n in "AG"} for m in methods]

    for _ in range(20):
        caches = [refreshed(m, s, 0.1, old) for m, s, old in zip(methods, given, caches, strict=True)]

    found = [inverse_of(m, cache) for m, cache in zip(methods, caches, strict=True) if cache is not None]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def part_of(method: Method, name: str, matrices: Tensor) -> Tensor:
    """Returns the statistic whose matrices these are, from rows that are their roots."""
    rows = torch.linalg.cholesky(matrices).mT.unsqueeze(2)
    return method._structures[name].moment(rows, 1.0, random_rows(SHAPE, samples=2, positions=1).replicate)


@pytest.mark.parametrize("kfac_like", [False, True])
def test_roots_come_to_the_inverse_of_statistics_that_stay(kfac_like: bool) -> None:
    method = method_of(kfac_like=kfac_like, rate=0.3)
    statistics, damping = statistics_of(method), 0.3
    cache: Cache | None = None

    for _ in range(150):
        cache = refreshed(method, statistics, damping, cache)

    assert cache is not None
    for b, (KK, CC) in enumerate(zip(*inverse_of(method, cache), strict=True)):
        A, G = statistics["A"][b, 0], statistics["G"][b, 0]
        if kfac_like:
            share = [x[b] for x in method._factors.damping(statistics, damping).values()]
            torch.testing.assert_close(KK @ (A + share[0] * torch.eye(7)), torch.eye(7, dtype=F64), rtol=0, atol=1e-8)
            torch.testing.assert_close(CC @ (G + share[1] * torch.eye(4)), torch.eye(4, dtype=F64), rtol=0, atol=1e-8)
        else:
            # tr(C^T G C) / O A + lambda tr(C^T C) / O I is the inverse of K K^T.
            damped = (CC @ G).trace() / 4 * A + damping * CC.trace() / 4 * torch.eye(7)
            torch.testing.assert_close(KK @ damped, torch.eye(7, dtype=F64), rtol=0, atol=1e-8)


@every_structure
@pytest.mark.parametrize("size", [1e-6, 50.0, 1e6])
def test_no_step_changes_the_sign_of_a_root(structure: str, size: float) -> None:
    method = method_of(structure=structure, rate=0.9, momentum=0.5, **STRUCTURES[structure])
    old = refreshed(method, statistics_of(method), 1e-3)

    cache = refreshed(method, statistics_of(method, seed=1, size=size), 1e-3, old)

    for name, root in (("A", "K"), ("G", "C")):
        factor = torch.linalg.solve(root_of(method, name, old[root]), root_of(method, name, cache[root]))
        # Of I - beta m, with beta at most 1/2 over the largest of m.
        assert float(torch.linalg.eigvals(factor).real.amin()) > 0.5 - 1e-6


@every_structure
def test_no_eigenvalue_of_a_step_exceeds_its_bound(structure: str) -> None:
    method = method_of(structure=structure, momentum=0, **STRUCTURES[structure])
    form, statistics = method._structures["A"], statistics_of(method)
    root = refreshed(method, statistics, 1e-3)["K"]

    step = form.conjugated(root, statistics["A"])

    values = torch.linalg.eigvals(root_of(method, "A", step)).abs().amax(-1)
    assert bool((values <= form.bound(step) * (1 + 1e-12)).all())


def root_of(method: Method, name: str, value: Tensor) -> Tensor:
    """Returns a root as matrices: the form's own, without its part below the diagonal for a low rank."""
    whole = method._structures[name].dense(value)
    if method._config.structure == "low_rank":
        rank = value.shape[1] - 1
        whole[:, rank:, :rank] = 0
    return whole


def test_a_new_damping_moves_no_root() -> None:
    method = method_of()
    statistics = statistics_of(method)
    cache = refreshed(method, statistics, 0.1)

    result = refresh(method, statistics, frozenset(), 10.0, cache)

    assert result.cache is cache
    assert result.endings == {}


def test_a_factor_that_is_new_moves_its_own_root_alone() -> None:
    method = method_of()
    statistics = statistics_of(method)
    cache = refreshed(method, statistics, 0.1)

    new = refresh(method, statistics, frozenset({"A"}), 0.1, cache).cache

    assert new is not None
    assert not torch.equal(new["K"], cache["K"])
    assert new["C"] is cache["C"]


def test_a_narrow_structure_holds_and_sends_fewer_numbers() -> None:
    numbers = {
        structure: sum(spec.form.numbers for spec in method_of((1, 60, 80), structure=structure).statistics)
        for structure in STRUCTURES
    }

    assert numbers == {
        "dense": 60 * 61 // 2 + 80 * 81 // 2,
        "block_diagonal": 5 * 30 * 31 // 2,
        "diagonal": 60 + 80,
        "low_rank": 16 * (60 + 80),
    }
    assert method_of().entries.keys() == {"K", "m_K", "C", "m_C"}
    assert method_of(momentum=0).entries.keys() == {"K", "C"}


def test_a_dense_factor_that_is_too_wide_is_a_diagonal() -> None:
    method = method_of(max_dense=5)

    assert [spec.shape for spec in method.statistics] == [(2, 7), (2, 1, 4, 4)]


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_a_width_that_no_structure_reads_is_refused(structure: str) -> None:
    with pytest.raises(ValueError, match=f"structure {structure} has no width: leave out width 3"):
        SINGD.model_validate({"structure": structure, "width": 3})


def test_settings_of_inversion_are_refused() -> None:
    with pytest.raises(ValueError, match="preconditioner singd inverts no factor: leave out inverse_dtype float16"):
        NGDConfig.model_validate({"preconditioner": {"kind": "singd"}, "inverse_dtype": "float16"})

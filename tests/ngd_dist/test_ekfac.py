"""EKFAC is the best diagonal in K-FAC's eigenbasis, it is used, and it costs no decomposition between two bases."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC as EKFACConfig
from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.config import AdaptiveInterval, FixedInterval, Settings, Thresholds
from ngd_dist.factors.cost import LayerShape
from ngd_dist.inversion import Eigen, Ending, solver
from ngd_dist.layers import LayerBatch
from ngd_dist.preconditioners import Cache, ekfac
from ngd_dist.preconditioners.ekfac import EKFAC
from ngd_dist.preconditioners.kfac import KFAC
from ngd_dist.statistics.staleness import REFRESHED, Schedule, Verdict
from ngd_dist.statistics.statistic import Key
from tests.reference import kronecker as dense
from tests.support.refreshing import refresh
from tests.support.rows import random_rows
from tests.support.tensors import F64
from tests.support.work import together

B, O, I = 2, 4, 5  # noqa: E741
SHAPE = LayerShape("layer", "kronecker", I, O, blocks=B)
BOTH = frozenset("AG")
S_ALONE = frozenset("S")
DAMPING = 0.01


def method(sharing: str = "expand", max_dense: int = 8192) -> EKFAC:
    return EKFAC(SHAPE, EKFACConfig.model_validate({"sharing": sharing}), max_dense)


def measured(ours: EKFAC, rows: LayerBatch) -> tuple[dict[str, Tensor], Cache]:
    """Returns all statistics of the rows, S in the basis of A and G, and the cache before S was measured."""
    statistics = ours.estimate(rows, BOTH, {})
    basis = refresh(ours, statistics, BOTH, DAMPING, None).cache
    assert basis is not None
    shared = {name: basis[name] for name in ours.shared}
    return statistics | ours.estimate(rows, S_ALONE, shared), basis


def gradient(seed: int = 9) -> Tensor:
    return torch.randn(B, O, I, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_factors_are_those_of_kfac(sharing: str) -> None:
    rows = random_rows(SHAPE.gradient, samples=20, positions=3)

    found = method(sharing).estimate(rows, BOTH, {})

    kfac = KFAC(SHAPE, KFACConfig.model_validate({"sharing": sharing}), 8192).estimate(rows, BOTH, {})
    a, g = (rows.a_BNPI, rows.g_BNPO) if sharing == "expand" else dense.reduced(rows.a_BNPI, rows.g_BNPO)
    for name, exact in zip("AG", dense.factors(a, g), strict=True):
        torch.testing.assert_close(found[name], exact, rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(kfac[name], exact, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 2, 9])  # bases applied to the rows of P = 2, to the gradients of P = 9
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_s_is_the_diagonal_of_the_fisher_in_the_basis(sharing: str, positions: int) -> None:
    rows = random_rows(SHAPE.gradient, samples=20, positions=positions)
    ours = method(sharing)

    statistics, _ = measured(ours, rows)

    a, g = (rows.a_BNPI, rows.g_BNPO) if sharing == "expand" else dense.reduced(rows.a_BNPI, rows.g_BNPO)
    A, G = dense.factors(a, g)
    for b, gradients in enumerate(dense.sample_gradients(a, g)):
        U = dense.eigenbasis(A[b], G[b])
        exact = (U.T @ dense.fisher(gradients) @ U).diagonal().view(O, I)
        torch.testing.assert_close(statistics["S"][b], exact, rtol=0, atol=1e-14 * float(exact.max()))


def test_samples_go_by_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(SHAPE.gradient, samples=7, positions=3)
    whole, _ = measured(method(), rows)

    monkeypatch.setattr(ekfac, "MAX_ENTRIES", 2 * B * O * I)  # 2 samples; the last chunk has one
    chunked, _ = measured(method(), rows)

    torch.testing.assert_close(chunked["S"], whole["S"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_the_block_is_nearer_to_the_fisher_than_that_of_kfac(seed: int) -> None:
    rows = random_rows(SHAPE.gradient, samples=30, positions=3, seed=seed)
    statistics, basis = measured(method(), rows)

    for b, gradients in enumerate(dense.sample_gradients(rows.a_BNPI, rows.g_BNPO)):
        exact = dense.fisher(gradients)
        U = torch.kron(basis["G"][b], basis["A"][b])
        ours = U @ torch.diag(statistics["S"][b].flatten()) @ U.T
        kfac = torch.kron(statistics["G"][b], statistics["A"][b])
        assert float((exact - ours).norm()) < float((exact - kfac).norm())


@pytest.mark.parametrize(("max_dense", "diagonal"), [(8192, ""), (4, "A"), (3, "AG")])
def test_the_direction_is_the_dense_solve_and_neither_sgds_nor_kfacs(max_dense: int, diagonal: str) -> None:
    rows = random_rows(SHAPE.gradient, samples=30, positions=3)
    ours, grad = method(max_dense=max_dense), gradient()
    statistics, basis = measured(ours, rows)

    cache = refresh(ours, statistics, S_ALONE, DAMPING, basis).cache
    assert cache is not None
    direction = ours.apply(cache, grad)

    A, G = dense.factors(rows.a_BNPI, rows.g_BNPO)
    for b, gradients in enumerate(dense.sample_gradients(rows.a_BNPI, rows.g_BNPO)):
        U = dense.eigenbasis(A[b, 0] if "A" in diagonal else A[b], G[b, 0] if "G" in diagonal else G[b])
        exact = dense.solve(dense.ekfac_block(U, dense.fisher(gradients)), DAMPING, grad[b])
        torch.testing.assert_close(direction[b], exact, rtol=1e-11, atol=1e-12)
    for other in (grad, ours.apply(basis, grad)):
        assert float(F.cosine_similarity(direction.flatten(), other.flatten(), dim=0)) < 0.98


def test_one_sample_gives_its_exact_fisher() -> None:
    rows = random_rows(SHAPE.gradient, samples=1, positions=1)
    ours, grad = method(), gradient()
    statistics, basis = measured(ours, rows)

    cache = refresh(ours, statistics, S_ALONE, DAMPING, basis).cache

    assert cache is not None
    for b, gradients in enumerate(dense.sample_gradients(rows.a_BNPI, rows.g_BNPO)):
        exact = dense.solve(dense.fisher(gradients), DAMPING, grad[b])
        # The dense solve loses what its condition number says: ||F|| / damping, some 1e5.
        torch.testing.assert_close(ours.apply(cache, grad)[b], exact, rtol=1e-9, atol=1e-9)


def test_unit_eigenvalues_give_back_the_gradient() -> None:
    bases = {name: torch.linalg.qr(torch.randn(B, n, n, dtype=F64))[0] for name, n in (("A", I), ("G", O))}
    cache = {**bases, "S": torch.ones(B, O, I, dtype=F64), "damping": torch.zeros((), dtype=F64)}
    grad = gradient()

    torch.testing.assert_close(method().apply(cache, grad), grad, rtol=1e-13, atol=1e-13)


def test_a_new_basis_begins_as_kfac_with_exact_damping() -> None:
    rows = random_rows(SHAPE.gradient, samples=30, positions=3)
    kfac = KFAC(SHAPE, KFACConfig(damping_form="exact"), 8192)
    statistics, basis = measured(method(), rows)

    same = refresh(kfac, statistics, BOTH, DAMPING, None).cache
    anew = refresh(method(), statistics, frozenset("A"), DAMPING, basis).cache  # that S is of the last basis

    assert same is not None
    assert anew is not None
    expected = kfac.apply(same, gradient())
    torch.testing.assert_close(method().apply(basis, gradient()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method().apply(anew, gradient()), expected, rtol=1e-12, atol=1e-12)


def refuse(factor: Tensor) -> Eigen:
    raise AssertionError("nothing was to be decomposed")


def test_between_two_bases_nothing_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(SHAPE.gradient, samples=30, positions=3)
    ours, grad = method(), gradient()
    statistics, basis = measured(ours, rows)

    monkeypatch.setattr(solver, "eigen", refuse)
    corrected = refresh(ours, statistics, S_ALONE, DAMPING, basis).cache
    damped = refresh(ours, statistics, frozenset(), 10 * DAMPING, corrected).cache
    before_s = refresh(ours, {name: statistics[name] for name in BOTH}, frozenset(), 10 * DAMPING, basis).cache

    assert corrected is not None
    assert damped is not None
    assert before_s is not None
    for old, new in ((corrected, damped), (basis, before_s)):
        entries = basis["G"].mT @ grad @ basis["A"] / (old["S"] + 10 * DAMPING)
        expected = basis["G"] @ entries @ basis["A"].mT
        torch.testing.assert_close(ours.apply(new, grad), expected, rtol=1e-12, atol=1e-12)


def test_the_old_basis_stays_if_the_decomposition_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(SHAPE.gradient, samples=30, positions=3)
    ours = method()
    statistics, basis = measured(ours, rows)

    monkeypatch.setattr(solver, "eigen", lambda factor: Eigen(None, None, Ending.NOT_CONVERGED))
    refreshed = refresh(ours, statistics, BOTH, DAMPING, basis)

    assert refreshed.cache is basis
    assert refreshed.endings == dict.fromkeys("AG", Ending.NOT_CONVERGED)
    assert refresh(ours, statistics, BOTH, DAMPING, None).cache is None


VERDICTS = st.sampled_from([Verdict.CHANGED, Verdict.MOVING, Verdict.SETTLED, Verdict.UNSEEN, Verdict.UNUSABLE])


@given(answers=st.lists(st.lists(VERDICTS, min_size=6, max_size=6), min_size=1, max_size=25), stagger=st.floats(0, 1))
def test_a_new_basis_is_left_alone_until_s_is_measured_in_it(answers: list[list[Verdict]], stagger: float) -> None:
    keys = [Key(layer, name) for layer in ("x", "y") for name in ("A", "G", "S")]
    in_basis = [key for key in keys if key.statistic == "S"]
    costs = together({"x": 3, "y": 1})
    schedule = Schedule(keys, costs, AdaptiveInterval(), stagger=stagger, in_basis=in_basis)
    for step, verdicts in enumerate(answers, start=1):
        given_verdicts = {
            key: verdict for key, verdict in zip(keys, verdicts, strict=True) if key in schedule.due(step)
        }
        schedule.advance(step, given_verdicts)

        rebuilt = {key.layer for key, verdict in given_verdicts.items() if key not in in_basis and verdict in REFRESHED}
        for layer in rebuilt:
            assert Key(layer, "S") not in given_verdicts
            assert [key for key in schedule.due(step + 1) if key.layer == layer] == [Key(layer, "S")]


LOOSE = AdaptiveInterval(thresholds=Thresholds(A=1e3, G=1e3, S=1e3))  # everything settles


def run(staleness: Settings, steps: int) -> tuple[list[list[str]], NGD, nn.Module]:
    """Returns what was due of the first layer in each step of a run, the optimizer and the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    settings = {"preconditioner": {"kind": "ekfac"}, "staleness": staleness, "stagger": 0.0}
    optimizer = NGD(model, NGDConfig.model_validate(settings))
    return train(model, optimizer, range(steps)), optimizer, model


def train(model: nn.Module, optimizer: NGD, steps: range) -> list[list[str]]:
    """Returns what was due of the first layer in each step."""
    due = []
    for step in steps:
        x = torch.randn(32, 6, dtype=F64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        due.append([refresh.statistic for refresh in optimizer.stats.refreshes if refresh.statistic.startswith("0.")])
    return due


@pytest.mark.parametrize(
    ("staleness", "bases", "measurements"),
    [
        (FixedInterval(steps=1), [1, 3, 5, 7, 9], [2, 4, 6, 8, 10]),  # every other step has S measured and in use
        (FixedInterval(steps=4), [1, 5, 9], [2, 6, 10]),
        (LOOSE, [1, 3, 5, 7, 10], [2, 4, 6, 8, 9]),  # intervals 1, 1, 2, 3, and a basis lasts at least 2 steps
    ],
)
def test_s_is_measured_in_every_basis(staleness: Settings, bases: list[int], measurements: list[int]) -> None:
    due, *_ = run(staleness, 10)

    assert [step for step, names in enumerate(due, start=1) if names == ["0.A", "0.G"]] == bases
    assert [step for step, names in enumerate(due, start=1) if names == ["0.S"]] == measurements


def test_a_run_goes_on_in_the_old_basis_if_the_decomposition_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    due, optimizer, model = run(FixedInterval(steps=4), 4)
    before = optimizer._curvature.caches["0"]

    monkeypatch.setattr(solver, "eigen", lambda factor: Eigen(None, None, Ending.NOT_CONVERGED))
    due += train(model, optimizer, range(4, 6))

    after = optimizer._curvature.caches["0"]
    assert before is not None
    assert after is not None
    assert due[4:] == [["0.A", "0.G"], ["0.S"]]
    assert optimizer.stats.failed_inversions == 4  # A and G of two layers
    assert all(torch.equal(before[name], after[name]) for name in "AG")
    assert not torch.equal(before["S"], after["S"])


def test_what_was_measured_is_what_divides() -> None:
    _, before, _ = run(FixedInterval(steps=4), 1)
    _, after, _ = run(FixedInterval(steps=4), 2)

    first, second = before._curvature.caches["0"], after._curvature.caches["0"]
    assert first is not None
    assert second is not None
    assert all(torch.equal(first[name], second[name]) for name in "AG")
    assert not torch.allclose(first["S"], second["S"], rtol=0.1)
    assert second["S"] is after._curvature.statistics[Key("0", "S")].value


def test_a_factor_that_changes_alone_makes_a_new_basis_and_s_starts_anew() -> None:
    # G's threshold is so low that it is due every other step; A's so high that its interval grows, as above.
    due, optimizer, _ = run(AdaptiveInterval(thresholds=Thresholds(A=1e3, G=1e-6, S=1e3)), 9)
    later, *_ = run(AdaptiveInterval(thresholds=Thresholds(A=1e3, G=1e-6, S=1e3)), 11)

    assert due[8] == ["0.G"]
    assert optimizer._curvature.statistics[Key("0", "S")].value is None
    assert later[9:] == [["0.S"], ["0.A", "0.G"]]  # A, due at step 10, leaves the basis alone for a step

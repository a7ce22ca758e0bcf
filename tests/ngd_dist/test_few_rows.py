"""Dense K-FAC by rows and their Gram matrices, where a step has few rows: the same weights as by whole matrices."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import FactorForm, Replicate
from ngd_dist.factors.gram import Gram, RowInverse
from ngd_dist.inversion import invert
from ngd_dist.preconditioners.factors import factor_forms
from ngd_dist.preconditioners.kfac import KFAC
from ngd_dist.step.agreement import shares_of
from tests.support.tensors import F64

WIDTH, SAMPLES = 24, 8
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _no_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as these would be stacked, with whole matrices."""
    monkeypatch.setattr("ngd_dist.covered.MAX_STACKED", 0)


class Whole(KFAC):
    """K-FAC by whole matrices alone."""

    def forms(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> Mapping[str, FactorForm]:
        return factor_forms(shape, max_dense)


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(30, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 3))
    return nn.Sequential(*layers).double()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def draw(step: int, samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, *shape, 30, dtype=F64, generator=generator)
    return x, torch.randint(3, (samples,), generator=generator)


def go_on(optimizer: NGD, model: nn.Module, sizes: list[int], first: int = 0, loss: Loss = cross_entropy) -> None:
    for step, samples in enumerate(sizes, first):
        x, y = draw(step, samples)
        optimizer.zero_grad()
        if optimizer.config.fisher.kind != "empirical":
            optimizer.fisher_backward(model(x))
        loss(model, x, y).backward()
        optimizer.step()


def train(
    method: type[KFAC], patch: pytest.MonkeyPatch, sizes: list[int], loss: Loss = cross_entropy, **more: Any
) -> NGD:
    """Returns the optimizer after these steps; `model` of the result has its weights."""
    patch.setattr(KFACConfig, "method", f"{method.__module__}:{method.__name__}")
    patch.setattr("ngd_dist.preconditioners.kfac.ROWS_CHECK", 0)  # the layers here are too small for a check to pay
    model = build_model()
    settings = {"lr": 0.05, "damping": 0.01, "staleness": {"kind": "fixed"}} | more
    optimizer = NGD(model, NGDConfig.model_validate(settings))
    go_on(optimizer, model, sizes, loss=loss)
    return optimizer


def weights(optimizer: NGD) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def count_of_rows(optimizer: NGD, layer: str = "0", factor: str = "A") -> int:
    """Returns the rows that the cache has in place of a matrix; 0 if it has the matrix."""
    cache = optimizer._curvature.caches[layer]
    assert cache is not None
    rows = cache.get(f"{factor} rows")
    return 0 if rows is None else rows.shape[1]


def assert_same(found: NGD, expected: NGD, tolerance: float = 1e-9) -> None:
    for own, other in zip(weights(found), weights(expected), strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


SETTINGS: dict[str, dict[str, Any]] = {
    "every step": {},
    "every third step": {"staleness": {"kind": "fixed", "steps": 3}},
    "adaptive": {"staleness": {"kind": "adaptive"}},
    "damping falls": {
        "damping_rule": {"kind": "exponential", "factor": 0.5, "every": 2},
        "staleness": {"kind": "fixed", "steps": 4},
    },
    "monte carlo": {"fisher": {"kind": "monte_carlo"}},
    "monte carlo, every third step": {"fisher": {"kind": "monte_carlo"}, "staleness": {"kind": "fixed", "steps": 3}},
    "two labels": {"fisher": {"kind": "monte_carlo", "samples": 2}},
    "exact Fisher": {"fisher": {"kind": "exact"}, "staleness": {"kind": "fixed", "steps": 2}},
    "sum": {"loss_reduction": "sum", "lr": 0.01},
    "reduce": {"preconditioner": {"kind": "kfac", "sharing": "reduce"}},
}
every_setting = pytest.mark.parametrize("name", SETTINGS)


@every_setting
def test_rows_give_the_weights_of_whole_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss: Loss = cross_entropy if name != "sum" else lambda model, x, y: F.cross_entropy(model(x), y, reduction="sum")
    sizes = [SAMPLES] * 7

    by_rows, whole = (train(method, monkeypatch, sizes, loss, **SETTINGS[name]) for method in (KFAC, Whole))

    assert (count_of_rows(by_rows), count_of_rows(whole)) == (SAMPLES, 0)
    assert_same(by_rows, whole)


@pytest.mark.parametrize(("fisher", "steps"), [("empirical", 1), ("empirical", 3), ("monte_carlo", 1)])
def test_directions_are_taken_from_rows(fisher: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    apply_rows = KFAC.apply_rows

    def watched(method: KFAC, *arguments: Any) -> Tensor:
        taken.append(method.shape.name)
        return apply_rows(method, *arguments)

    monkeypatch.setattr(KFAC, "apply_rows", watched)

    train(KFAC, monkeypatch, [SAMPLES] * 4, fisher={"kind": fisher}, staleness={"kind": "fixed", "steps": steps})

    # Under Monte Carlo the rows of the loss are kept from the second step on.
    assert taken.count("0") == taken.count("2") == (4 if fisher == "empirical" else 3)


def test_a_direction_is_the_solution_with_both_damped_factors() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 18, dtype=F64)
    x, y = torch.randn(6, 20, dtype=F64), torch.randint(18, (6,))
    optimizer = NGD(model, NGDConfig(lr=1.0, momentum=0.0, damping=0.01))
    before = torch.cat([model.weight.detach(), model.bias.detach().unsqueeze(1)], dim=1)

    F.cross_entropy(model(x), y).backward()
    optimizer.step()

    a = torch.cat([x, torch.ones(6, 1, dtype=F64)], dim=1)
    g = (torch.softmax(x @ before[:, :-1].T + before[:, -1], 1) - F.one_hot(y, 18)).to(F64)
    A, G = a.T @ a / 6, g.T @ g / 6
    pi = (A.diagonal().mean() / G.diagonal().mean()).sqrt()
    damped_A, damped_G = (X + d * torch.eye(len(X), dtype=F64) for X, d in ((A, 0.1 * pi), (G, 0.1 / pi)))
    expected = torch.linalg.solve(damped_G, g.T @ a / 6) @ torch.linalg.inv(damped_A)
    moved = before - torch.cat([model.weight.detach(), model.bias.detach().unsqueeze(1)], dim=1)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-11)


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model, x, y) + 0.01 * sum(p.square().sum() for p in model.parameters())


def with_another_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Its second part uses a weight without its module."""
    return cross_entropy(model, x, y) + 0.1 * F.linear(x.flip(1), model[0].weight).square().mean()  # type: ignore[index]


def clipped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def clip(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        weight.grad.clamp_(-1e-3, 1e-3)

    model[0].weight.register_post_accumulate_grad_hook(clip)  # type: ignore[index]
    return cross_entropy(model, x, y)


def scaled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def halve(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        weight.grad.mul_(0.5)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(halve)
    return cross_entropy(model, x, y)


@pytest.mark.parametrize("loss", [penalised, with_another_loss, clipped, scaled])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_counts_is_what_is_in_grad(loss: Loss, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    staleness = {"kind": "fixed", "steps": steps}

    by_rows, whole = (train(m, monkeypatch, [SAMPLES] * 5, loss, staleness=staleness) for m in (KFAC, Whole))

    assert count_of_rows(by_rows) > 0
    assert_same(by_rows, whole)


@pytest.mark.parametrize("steps", [1, 2])
def test_batches_of_any_size_give_the_weights_of_whole_matrices(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, staleness = [8, 5, 40, 8, 1, 13, 8], {"kind": "fixed", "steps": steps}

    by_rows, whole = (train(m, monkeypatch, sizes, staleness=staleness) for m in (KFAC, Whole))

    assert_same(by_rows, whole)


def test_a_batch_with_many_rows_has_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = train(KFAC, monkeypatch, [SAMPLES, WIDTH // 2 + 1])

    assert [count_of_rows(optimizer, "2", factor) for factor in ("A", "G")] == [0, 0]
    assert count_of_rows(optimizer, "0", "A") == WIDTH // 2 + 1  # of width 31


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.5},
        {"inverse_dtype": "bfloat16"},
        {"micro_batches": 2},
        {"staleness": {"kind": "adaptive", "criterion": "error"}},
        {"preconditioner": {"kind": "kfac", "damping_form": "exact"}},
    ],
)
def test_settings_that_need_whole_matrices_have_them(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = train(KFAC, monkeypatch, [SAMPLES], **settings)

    assert count_of_rows(optimizer) == 0


class Shared(nn.Module):
    """A layer that runs twice, at several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(30, 30)
        self.last = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.tanh(self.first(x))).mean(1))


@pytest.mark.parametrize("steps", [1, 2])
def test_runs_and_positions_are_rows(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(method: type[KFAC]) -> NGD:
        monkeypatch.setattr(KFACConfig, "method", f"{method.__module__}:{method.__name__}")
        monkeypatch.setattr("ngd_dist.preconditioners.kfac.ROWS_CHECK", 0)
        torch.manual_seed(0)
        model = Shared().double()
        optimizer = NGD(model, NGDConfig(lr=0.05, damping=0.01, staleness={"kind": "fixed", "steps": steps}))
        for step in range(4):
            x, y = draw(step, 3, 2)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return optimizer

    by_rows, whole = trained(KFAC), trained(Whole)

    assert count_of_rows(by_rows, "first") == 3 * 2 * 2
    assert_same(by_rows, whole)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_embedding_of_few_tokens_takes_the_steps_of_whole_matrices(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(method: type[KFAC]) -> NGD:
        monkeypatch.setattr(KFACConfig, "method", f"{method.__module__}:{method.__name__}")
        monkeypatch.setattr("ngd_dist.preconditioners.kfac.ROWS_CHECK", 0)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(60, 24), nn.Flatten(), nn.Linear(48, 3)).double()
        optimizer = NGD(model, NGDConfig(lr=0.05, damping=0.01, staleness={"kind": "fixed", "steps": steps}))
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randint(60, (4, 2), generator=generator)), torch.arange(4) % 3).backward()
            optimizer.step()
        return optimizer

    by_rows, whole = trained(KFAC), trained(Whole)

    assert count_of_rows(by_rows, "0", "G") == 8
    assert_same(by_rows, whole)


# --- saved states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [{"kind": "fixed", "steps": 5}, {"kind": "adaptive"}])
def test_a_saved_state_goes_on_to_the_bit(staleness: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = train(KFAC, monkeypatch, [SAMPLES] * 3, staleness=staleness)
    state, model = copy.deepcopy(unbroken.state_dict()), copy.deepcopy(unbroken._bare)
    resumed = NGD(model, unbroken.config)
    resumed.load_state_dict(state)

    for optimizer in (unbroken, resumed):
        go_on(optimizer, optimizer._bare, [SAMPLES] * 5, first=3)

    assert count_of_rows(resumed) == SAMPLES
    for own, other in zip(weights(resumed), weights(unbroken), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("saver", "more"), [(Whole, {}), (KFAC, {"ema_decay": 0.5}), (KFAC, {"inverse_dtype": "float16"})]
)
def test_a_state_of_one_form_loads_with_another(
    saver: type[KFAC], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train(saver, monkeypatch, [SAMPLES] * 2, staleness={"kind": "fixed", "steps": 3}, stagger=0.0)
    state, model = copy.deepcopy(unbroken.state_dict()), copy.deepcopy(unbroken._bare)
    monkeypatch.setattr(KFACConfig, "method", f"{KFAC.__module__}:{KFAC.__name__}")
    resumed = NGD(model, unbroken.config.model_copy(update=more))
    resumed.load_state_dict(state)

    for optimizer in (unbroken, resumed):
        go_on(optimizer, optimizer._bare, [SAMPLES], first=2)

    assert count_of_rows(resumed) == (0 if saver is Whole or more else SAMPLES)
    assert_same(resumed, unbroken, 1e-3 if "inverse_dtype" in more else 1e-9)


# --- the form ---------------------------------------------------------------------------------------------------------

FORM, WHOLE = Gram((2, 12, 12)), Dense((2, 12, 12))
ALL = Replicate(is_all=True)


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(2, count, 1, 12, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("counts", [(4, 4), (4, 3), (4, 9), (9, 4), (6, 6)])
def test_norms_sums_and_distances_are_those_of_the_matrices(counts: tuple[int, int]) -> None:
    scale = torch.tensor([0.5, 3.0], dtype=F64)
    x, y = (FORM.moment(rows(count, seed), scale, ALL) for seed, count in enumerate(counts))
    X, Y = (WHOLE.moment(rows(count, seed), scale, ALL) for seed, count in enumerate(counts))

    assert [FORM.is_rows(value) for value in (x, y)] == [2 * count <= 12 for count in counts]
    torch.testing.assert_close(FORM.dense(x), X)
    torch.testing.assert_close(FORM.dense(FORM.plus(x, y)), X + Y)
    torch.testing.assert_close(FORM.dense(FORM.times(x, 0.3)), X * 0.3)
    torch.testing.assert_close(FORM.dense(FORM.averaged(x.clone(), y, 0.3, reuses=True)), torch.lerp(X, Y, 0.3))
    torch.testing.assert_close(FORM.norm(x), torch.linalg.vector_norm(X))
    torch.testing.assert_close(FORM.distance(x, y), torch.linalg.vector_norm(X - Y))
    torch.testing.assert_close(FORM.mean_eigenvalue(x), WHOLE.mean_eigenvalue(X))
    assert torch.equal(FORM.recalled(FORM.remembered(x)), x)
    assert FORM.remembered(x).shape == WHOLE.remembered(X).shape


def test_a_packed_inverse_is_told_from_a_whole_one() -> None:
    X, damping = rows(5).flatten(1, 2), torch.tensor([0.1, 0.3], dtype=F64)
    whole, small = invert(X.mT @ X, damping).value, invert(X @ X.mT, damping).value
    assert whole is not None
    assert small is not None
    parts = RowInverse(X, small, damping)

    unpacked = FORM.unpack_inverse(FORM.pack_inverse(parts))

    assert FORM.unpack_inverse(whole) is None
    assert unpacked is not None
    assert torch.equal(unpacked.rows, X)
    assert torch.equal(unpacked.inverse, small)
    assert torch.equal(unpacked.damping, damping)
    torch.testing.assert_close(parts.dense(), whole)
    matrix = torch.randn(2, 7, 12, dtype=F64)
    torch.testing.assert_close(parts.right(matrix), matrix @ whole)
    torch.testing.assert_close(parts.left(matrix.mT), whole @ matrix.mT)


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 64, 1024])
def test_a_sum_of_products_is_told_from_any_other_gradient(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    a, g = (torch.randn(1, count, width, dtype=dtype, generator=generator) for width in (300, 200))
    gradient = 0.01 * (g.mT @ a)
    penalty = torch.zeros_like(gradient)
    penalty[0, 3, 4] = 1e-3 * float(torch.linalg.vector_norm(gradient))

    shares = shares_of({"product": (gradient, a, g), "other": (gradient + penalty, a, g), "none": (0 * gradient, a, g)})

    assert shares == {"product": pytest.approx(0.01, rel=1e-4)}


def test_gradients_of_samples_that_are_certain_make_no_subnormal_numbers() -> None:
    """A CPU takes a hundred times as long for them; a softmax leaves gradients as small as 1e-44."""
    form = Gram((1, 8, 8))
    g = torch.tensor([[3e-3] * 8, [2e-25] * 8]).view(1, 2, 1, 8)
    rows = form.moment(g, 1.0, Replicate(is_all=True))
    assert form.is_rows(rows)
    assert bool((rows[0, 1] == 0).all())
    torch.testing.assert_close(form.dense(rows), form.dense(g.flatten(1, 2)))

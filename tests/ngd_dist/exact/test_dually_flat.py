"""Dually flat regression: its natural gradient is exact, and a step touches the observed rows alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ngd_dist.config.dually_flat import StepSize
from ngd_dist.errors import CheckpointError, ConfigError
from ngd_dist.exact.dually_flat import CSNGD, DuallyFlatRegression, Duals, clipped_inverse, joint_fisher

SIZES, CLASSES = [3, 2, 4], 3


def random_model(sizes: list[int] = SIZES, **options: Any) -> DuallyFlatRegression:
    torch.manual_seed(1)
    model = DuallyFlatRegression(sizes, CLASSES, **options)
    model.alpha_S.normal_()
    model.beta_MS.normal_()
    return model


def data(sizes: list[int], observations: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.stack([torch.randint(size, (observations,)) for size in sizes], 1)
    return x, torch.randint(CLASSES, (observations,))


def statistic(x: tuple[int, ...], y: int) -> Tensor:
    """Returns the sufficient statistics [D] of one (x, y), in the order of theta."""
    of_class = [float(y == k) for k in range(CLASSES - 1)]
    of_pairs = [
        float(x[i] == v and y == k) for i, size in enumerate(SIZES) for v in range(size - 1) for k in range(CLASSES)
    ]
    return torch.tensor([*of_class, *of_pairs], dtype=torch.float64)


def enumerated(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean [D] and the covariance [D, D] of the statistics: sums over every (x, y)."""
    outcomes = itertools.product(itertools.product(*map(range, SIZES)), range(CLASSES))
    t = torch.stack([statistic(x, y) for x, y in outcomes])
    p = (t @ theta).softmax(0)
    mean = p @ t
    return mean, (t - mean).T @ ((t - mean) * p[:, None])


def free_duals(duals: Duals) -> Tensor:
    return torch.cat([duals.p_S[:-1], *(block[:-1].flatten() for block in duals.p_MS.split(SIZES))])


def test_a_run_goes_on_from_its_state_to_the_bit() -> None:
    x, y = data(SIZES, 40)
    whole, rest = random_model(), DuallyFlatRegression(SIZES, CLASSES)
    whole.step(x[:20], y[:20])
    state = whole.state_dict()
    whole.step(x[20:], y[20:])

    rest.load_state_dict(state)
    rest.step(x[20:], y[20:])

    assert torch.equal(rest.theta(), whole.theta())
    assert rest.steps == whole.steps == 2
    assert rest.observations == whole.observations


def test_a_state_of_other_sizes_is_refused() -> None:
    model = random_model()
    before = model.theta()

    with pytest.raises(CheckpointError, match="other features or classes"):
        model.load_state_dict(DuallyFlatRegression([3, 3, 4], CLASSES).state_dict())

    assert torch.equal(model.theta(), before)


def test_natural_gradient_at_own_duals_is_that_of_the_dense_fisher() -> None:
    model = random_model()
    x, y = data(SIZES, 20)
    _, fisher = enumerated(model.theta())
    gradient = torch.stack(
        [
            sum(
                (prob * statistic(tuple(row.tolist()), k) for k, prob in enumerate(probs)),
                -statistic(tuple(row.tolist()), int(label)),
            )
            for row, label, probs in zip(x, y, model.logits(x).softmax(1), strict=True)
        ]
    ).mean(0)

    natural = model.natural_gradient(x, y, model.own_duals())

    torch.testing.assert_close(model.gradient(x, y), gradient, rtol=0, atol=1e-15)
    torch.testing.assert_close(natural, torch.linalg.solve(fisher, gradient), rtol=1e-12, atol=1e-12)


def test_own_duals_and_fisher_are_the_enumerated_ones() -> None:
    model = random_model()
    mean, covariance = enumerated(model.theta())

    torch.testing.assert_close(free_duals(model.own_duals()), mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(joint_fisher(SIZES, model.own_duals()), covariance, rtol=0, atol=1e-15)


@pytest.mark.parametrize("duals", ["running", "own"])
def test_step_on_observed_rows_is_the_dense_step(duals: Any) -> None:
    model = random_model(duals=duals, step_size=StepSize(a=0.03, b=0.5))
    x, y = data(SIZES, 50)

    for step in range(3):
        at = model.running_duals() if duals == "running" else model.own_duals()
        expected = model.theta() - 0.03 / (1 + 0.5 * step) * model.natural_gradient(x, y, at)
        model.step(x, y)
        torch.testing.assert_close(model.theta(), expected, rtol=1e-12, atol=1e-12)


def test_running_duals_are_never_0_and_consistent() -> None:
    model = DuallyFlatRegression(SIZES, CLASSES)
    start = model.running_duals()
    for _ in range(100):
        model.step(torch.zeros(10, 3, dtype=torch.int64), torch.zeros(10, dtype=torch.int64))
    end = model.running_duals()

    torch.testing.assert_close(start.p_S, torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64))
    assert model.observations == 1000 + sum(SIZES) - len(SIZES) + 1
    assert float(model.counts_MS.min()) == pytest.approx(7 / (4 * CLASSES))
    for block in end.p_MS.split(SIZES):
        torch.testing.assert_close(block.sum(0), end.p_S)
    assert bool(torch.isfinite(model.theta()).all())


def test_step_changes_the_rows_and_counts_of_the_observed_categories_alone() -> None:
    sizes = [50, 2, 70, 5]
    model = random_model(sizes)
    tables = [model.alpha_S, model.beta_MS, model.counts_S, model.counts_MS]
    before = [table.clone() for table in tables]

    model.step(*data(sizes, 1))

    changed = [int((table != old).sum()) for table, old in zip(tables, before, strict=True)]
    assert changed == [CLASSES, 4 * CLASSES, 1, 4]


class Formed(TorchDispatchMode):
    """Sums the numbers of all tensors that are formed, and has the size of the largest; views are not formed."""

    total = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = not any(r.alias_info for r in func._schema.returns)
        for tensor in result if isinstance(result, tuple) else (result,):
            if is_new and isinstance(tensor, Tensor):
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        return result


def formed(sizes: list[int], observations: int) -> Formed:
    model, batch = random_model(sizes), data(sizes, observations)
    with Formed() as formed:
        model.step(*batch)
    return formed


def test_cost_of_a_step_is_linear_in_features_and_observations_and_free_of_sizes() -> None:
    small = formed([9] * 4, 16)

    assert formed([900] * 4, 16).total == small.total
    assert formed([9] * 8, 16).total <= 2 * small.total
    assert formed([9] * 4, 32).total <= 2 * small.total
    assert small.largest <= 16 * max(CLASSES, 4)


def test_clipped_inverse_has_eigenvalues_within_bounds() -> None:
    model = random_model()
    fisher = joint_fisher(SIZES, model.own_duals())

    bounded = torch.linalg.eigvalsh(clipped_inverse(fisher, 2.0, 50.0))

    assert float(bounded.min()) >= 2 - 1e-9
    assert float(bounded.max()) <= 50 + 1e-9
    torch.testing.assert_close(
        clipped_inverse(fisher, 1e-9, 1e9) @ fisher, torch.eye(len(fisher), dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_csngd_within_its_bounds_is_dsngd() -> None:
    model = DuallyFlatRegression(SIZES, CLASSES, step_size=StepSize(a=0.2, b=0.1))
    csngd = CSNGD(model.theta(), smallest=1e-9, largest=1e9, step_size=model.step_size)
    x, y = data(SIZES, 40)

    for _ in range(3):
        csngd.step(model.gradient(x, y), joint_fisher(SIZES, model.running_duals()))
        model.step(x, y)
        torch.testing.assert_close(csngd.theta, model.theta(), rtol=1e-10, atol=1e-10)


def test_csngd_stays_bounded_on_a_singular_fisher() -> None:
    csngd = CSNGD(torch.zeros(2), smallest=0.5, largest=4.0, step_size=StepSize(a=1, b=0))

    csngd.step(torch.ones(2), torch.zeros(2, 2))

    torch.testing.assert_close(csngd.theta, torch.full((2,), -4.0))


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ([[0, 2, 0]], [0], "category 2 of feature 1 is unknown: it has 2"),
        ([[0, -1, 0]], [0], "category -1 of feature 1"),
        ([[0, 1]], [0], r"x must be \[N > 0, 3\], got \[1, 2\]"),
        ([[0, 1, 0]], [3], "class 3 .* is not in 0..2"),
        ([[0, 1, 0]], [0, 1], r"y must be int64 \[1\]"),
        ([[0.0, 1.0, 0.0]], [0], "int64, got torch.float32"),
    ],
)
def test_bad_observations_are_refused(x: Any, y: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DuallyFlatRegression(SIZES, CLASSES).step(torch.tensor(x), torch.tensor(y))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sizes=\[3, 0\] and classes=2"):
        DuallyFlatRegression([3, 0], 2)
    with pytest.raises(ConfigError, match=r"prior_count must be > 0, .* got 0"):
        DuallyFlatRegression([3], 2, prior_count=0)
    with pytest.raises(ConfigError, match="'mean'"):
        DuallyFlatRegression([3], 2, duals="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"got 2.0 and 1.0"):
        CSNGD(torch.zeros(2), smallest=2.0, largest=1.0)

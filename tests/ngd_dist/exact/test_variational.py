"""Natural steps of Gaussian distributions: the exact posterior in one step, and agreement with the dense Fisher."""

import copy
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from ngd_dist.errors import ConfigError, NonFiniteError
from ngd_dist.exact.variational import Parametrisation, VariationalNGD, gpytorch_pairs
from tests.support.ranks import run_ranks

M = 12
NOISE = 0.1
PARAMETRISATIONS = get_args(Parametrisation)
Pairs = tuple[nn.Parameter, nn.Parameter]


def kernel(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * (x - x.mT).square() / 0.1) + 1e-6 * torch.eye(len(x), dtype=x.dtype)


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.linspace(0, 1, M, dtype=torch.float64).unsqueeze(1)
    return x, (6 * x).sin().squeeze(1) + NOISE**0.5 * torch.randn(M, dtype=torch.float64)


def start(seed: int = 1) -> Pairs:
    torch.manual_seed(seed)
    root = torch.eye(M, dtype=torch.float64) + 0.1 * torch.randn(M, M, dtype=torch.float64).tril()
    return nn.Parameter(torch.randn(M, dtype=torch.float64)), nn.Parameter(root)


def kl(mean: Tensor, root: Tensor) -> Tensor:
    """KL(N(m, L L^T) || N(0, I)) without its constant."""
    return 0.5 * (root.tril().square().sum() + mean @ mean) - root.diagonal().log().sum()


def gaussian(x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The negative ELBO of regression, up to a constant; values of the function are C u with C C^T the kernel."""
    C = torch.linalg.cholesky(kernel(x))

    def loss(mean: Tensor, root: Tensor) -> Tensor:
        variance = (C @ root.tril()).square().sum(1)
        return 0.5 * ((y - C @ mean).square() + variance).sum() / NOISE + kl(mean, root)

    return loss


def bernoulli(x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The negative ELBO of classification with a logistic likelihood, by quadrature."""
    C, labels = torch.linalg.cholesky(kernel(x)), (y > 0).double() * 2 - 1
    nodes = torch.linspace(-6, 6, 101, dtype=torch.float64)
    weights = torch.softmax(-0.5 * nodes.square(), 0)

    def loss(mean: Tensor, root: Tensor) -> Tensor:
        deviation = (C @ root.tril()).square().sum(1).sqrt()
        values = (C @ mean).unsqueeze(1) + deviation.unsqueeze(1) * nodes
        return -(nn.functional.logsigmoid(labels.unsqueeze(1) * values) @ weights).sum() + kl(mean, root)

    return loss


def take(optimizer: torch.optim.Optimizer, loss: Callable[[Tensor, Tensor], Tensor], pair: Pairs) -> float:
    optimizer.zero_grad()
    value = loss(*pair)
    value.backward()
    optimizer.step()
    return float(value.detach())


def test_one_step_reaches_the_exact_posterior_of_a_gaussian_likelihood(points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    pair, K = start(), kernel(x)
    C = torch.linalg.cholesky(K)

    take(VariationalNGD([pair], gamma=1.0), gaussian(x, y), pair)

    gain = torch.linalg.solve(K + NOISE * torch.eye(M, dtype=torch.float64), K).mT
    root = C @ pair[1]
    assert torch.allclose(C @ pair[0], gain @ y, atol=1e-10, rtol=0)
    assert torch.allclose(root @ root.mT, K - gain @ K, atol=1e-10, rtol=0)


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_a_small_step_is_the_dense_fisher_inverse_times_the_gradient(
    parametrisation: Parametrisation, points: tuple[Tensor, Tensor]
) -> None:
    """Oracle: the Fisher matrix of N(m, L L^T) in (m, L), formed whole: the Hessian of KL(p || q) at q = p."""
    loss, pair, gamma = bernoulli(*points), start(), 1e-7
    rows, columns = torch.tril_indices(M, M)
    before = torch.cat([pair[0].detach(), pair[1].detach()[rows, columns]])

    def divergence(xi: Tensor) -> Tensor:
        root = torch.zeros(M, M, dtype=torch.float64).index_put((rows, columns), xi[M:])
        old = torch.zeros(M, M, dtype=torch.float64).index_put((rows, columns), before[M:])
        inverse = torch.linalg.solve_triangular(root, torch.eye(M, dtype=torch.float64), upper=False)
        difference = inverse @ (xi[:M] - before[:M])
        return 0.5 * ((inverse @ old).square().sum() + difference @ difference) + root.diagonal().log().sum()

    fisher = torch.autograd.functional.hessian(divergence, before)
    loss(*pair).backward()
    assert pair[0].grad is not None
    assert pair[1].grad is not None
    gradient = torch.cat([pair[0].grad, pair[1].grad[rows, columns]])
    VariationalNGD([pair], gamma=gamma, parametrisation=parametrisation).step()

    moved = (torch.cat([pair[0].detach(), pair[1].detach()[rows, columns]]) - before) / gamma
    expected = -torch.linalg.solve(fisher, gradient)
    assert float((moved - expected).norm() / expected.norm()) < 1e-5  # the curve of a step of 1e-7, and rounding


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
def test_a_bernoulli_likelihood_converges_where_adam_is_still_far(
    parametrisation: Parametrisation, points: tuple[Tensor, Tensor]
) -> None:
    loss, pair, slow = bernoulli(*points), start(), start()
    exact = start()
    newton = VariationalNGD([exact], gamma=0.5)
    for _ in range(200):
        best = take(newton, loss, exact)
    optimizer = VariationalNGD([pair], gamma=0.1, warmup=5, parametrisation=parametrisation)
    adam = torch.optim.Adam(slow, lr=0.01)

    ours = [take(optimizer, loss, pair) for _ in range(100)][-1]
    theirs = [take(adam, loss, slow) for _ in range(100)][-1]

    assert ours - best < 1e-3
    assert theirs - best > 100 * (ours - best)


def test_a_step_too_long_is_halved_until_the_covariance_is_positive_definite() -> None:
    shrinking = 1e3 * torch.eye(M, dtype=torch.float64)  # as if a smaller covariance were better without end

    for gradient in (shrinking, -shrinking):  # by the other, the precision would change its sign
        for parametrisation in PARAMETRISATIONS:
            mean, root = start()
            mean.grad, root.grad = torch.zeros_like(mean), gradient.clone()
            VariationalNGD([(mean, root)], gamma=1.0, parametrisation=parametrisation).step()
            assert bool((root.diagonal() > 0).all())
            assert bool(root.isfinite().all())
            assert not torch.equal(root, start()[1])


def test_batches_of_distributions_move_as_each_alone(points: tuple[Tensor, Tensor]) -> None:
    x, y = points
    loss, alone = bernoulli(x, y), [start(seed) for seed in (1, 2)]
    together = (
        nn.Parameter(torch.stack([pair[0].detach() for pair in alone])),
        nn.Parameter(torch.stack([pair[1].detach().tril() for pair in alone])),
    )

    for pair in alone:
        take(VariationalNGD([pair]), loss, pair)
    sum(loss(together[0][index], together[1][index]) for index in (0, 1)).backward()  # type: ignore[union-attr]
    VariationalNGD([together]).step()

    for index, pair in enumerate(alone):
        assert torch.allclose(together[0][index], pair[0], atol=1e-13)
        assert torch.allclose(together[1][index], pair[1], atol=1e-13)


def test_a_run_goes_on_from_its_state_to_the_bit(points: tuple[Tensor, Tensor]) -> None:
    loss, pair = bernoulli(*points), start()
    optimizer = VariationalNGD([pair], warmup=5)
    for _ in range(3):
        take(optimizer, loss, pair)
    copied = tuple(nn.Parameter(p.detach().clone()) for p in pair)
    state = copy.deepcopy(optimizer.state_dict())
    again = VariationalNGD([(copied[0], copied[1])])
    again.load_state_dict(state)

    for _ in range(3):
        take(optimizer, loss, pair)
        take(again, loss, (copied[0], copied[1]))

    assert torch.equal(pair[0], copied[0])
    assert torch.equal(pair[1], copied[1])


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    first, second = start(), start()
    before = [p.detach().clone() for p in (*first, *second)]
    for p in (*first, *second):
        p.grad = torch.ones_like(p)
    second[1].grad[0, 0] = float("nan")  # type: ignore[index]

    with pytest.raises(NonFiniteError, match="pair 1 is NaN"):
        VariationalNGD([first, second]).step()

    assert all(torch.equal(p, old) for p, old in zip((*first, *second), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gamma": 1.5}, "gamma must be above 0 and at most 1, got 1.5"),
        ({"gamma": 0.0}, "got 0.0"),
        ({"num_data": 0}, "num_data must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0 steps, got -1"),
        ({"parametrisation": "root"}, "got 'root'"),
        ({"pairs": []}, "pairs is empty"),
        (
            {"pairs": [(nn.Parameter(torch.zeros(2)), nn.Parameter(torch.eye(3)))]},
            r"got \[2\] torch.float32 and \[3, 3\]",
        ),
        ({"pairs": [(nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2)))]}, "positive diagonal"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        VariationalNGD(**({"pairs": [start()]} | arguments))  # type: ignore[arg-type]


def test_a_model_without_a_cholesky_distribution_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CholeskyVariationalDistribution"):
        gpytorch_pairs(nn.Linear(2, 2))


def test_a_gpytorch_model_reaches_the_exact_posterior_in_one_step(points: tuple[Tensor, Tensor]) -> None:
    gpytorch = pytest.importorskip("gpytorch")
    x, y = points

    class Regression(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            distribution = gpytorch.variational.CholeskyVariationalDistribution(M)
            super().__init__(gpytorch.variational.VariationalStrategy(self, x, distribution, jitter_val=1e-6))
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), gpytorch.kernels.RBFKernel()

        def forward(self, x: Tensor) -> object:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model, likelihood = Regression().double(), gpytorch.likelihoods.GaussianLikelihood().double()
    model.covar_module.lengthscale, likelihood.noise = 0.1**0.5, NOISE
    loss = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=M)
    model(x)  # GPyTorch sets the variational mean to the prior's in the first call

    (-loss(model(x), y)).backward()
    VariationalNGD(gpytorch_pairs(model), gamma=1.0, num_data=M).step()

    K = kernel(x)
    gain = torch.linalg.solve(K + NOISE * torch.eye(M, dtype=torch.float64), K).mT
    model.eval()
    posterior = model(x)
    assert torch.allclose(posterior.mean, gain @ y, atol=1e-4, rtol=0)  # its own jitter is 1e-6 of 1, on a kernel
    assert torch.allclose(posterior.covariance_matrix, K - gain @ K, atol=1e-4, rtol=0)


def _of_rank(rank: int, world_size: int, gradients: list[Tensor]) -> list[Tensor]:
    pair, idle = start(1 + rank), start()
    optimizer = VariationalNGD([pair, idle], gamma=0.5)
    pair[0].grad, pair[1].grad = (gradient.clone() for gradient in gradients[2 * rank : 2 * rank + 2])
    optimizer.step()
    assert torch.equal(idle[0], start()[0])
    return [p.detach() for p in pair]


@pytest.mark.ranks
def test_ranks_take_the_step_of_the_mean_gradient_from_the_start_of_the_first(points: tuple[Tensor, Tensor]) -> None:
    gradients: list[Tensor] = []
    for loss in (bernoulli(*points), gaussian(*points)):
        pair = start()
        loss(*pair).backward()
        gradients += [p.grad for p in pair if p.grad is not None]

    both = run_ranks(2, _of_rank, gradients)

    pair = start()
    pair[0].grad, pair[1].grad = (gradients[0] + gradients[2]) / 2, (gradients[1] + gradients[3]) / 2
    VariationalNGD([pair], gamma=0.5).step()
    for moved in both:
        assert all(torch.allclose(value, p, atol=1e-12) for value, p in zip(moved, pair, strict=True))
    assert torch.equal(both[0][1], both[1][1])

"""Steps are GPflow's: by its formula, differentiated densely, and in the figures of its notebook on natural gradients.

The notebook is doc/source/notebooks/advanced/natural_gradients.ipynb of GPflow/docs at 0b8a6f5. Its outputs are those
of two iterations, and of points that numpy draws from seed 0.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ngd_dist.exact.variational import Parametrisation, VariationalNGD

N, RATE, JITTER = 100, 0.01, 1e-6
Data = tuple[Tensor, Tensor]


@pytest.fixture
def notebook() -> Data:
    """Returns the notebook's 100 points [N, 2] and labels [N, 2] of -1 and 1, of two functions."""
    numpy = pytest.importorskip("numpy")
    draws = numpy.random.RandomState(0)
    return torch.tensor(draws.uniform(size=(N, 2))), torch.tensor(draws.choice([1.0, -1.0], size=(N, 2)))


class VGP(nn.Module):
    """f = C u with C Cᵀ the Matern 5/2 kernel and q(u) = N(m, L Lᵀ), for each of two outputs."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.distances = (x.unsqueeze(1) - x).square().sum(2)
        ones = torch.ones(2, dtype=torch.float64)
        self.variance_and_scale = nn.Parameter(ones.expm1().log())
        self.mean = nn.Parameter(torch.zeros(2, N, dtype=torch.float64))
        self.root = nn.Parameter(torch.eye(N, dtype=torch.float64).repeat(2, 1, 1))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns means and variances of f, each [2, N], and KL(q(u) || N(0, I))."""
        variance, scale = softplus(self.variance_and_scale)
        # As GPflow has it: the least squared distance keeps the slope of the root finite.
        z = 5**0.5 * (self.distances.clamp_min(1e-36)).sqrt() / scale
        kernel = variance * (1 + z + z.square() / 3) * (-z).exp() + JITTER * torch.eye(N, dtype=torch.float64)
        C, L = torch.linalg.cholesky(kernel), self.root.tril()
        kl = 0.5 * (L.square().sum() + self.mean.square().sum() - 2 * N) - L.diagonal(dim1=1, dim2=2).log().sum()
        return self.mean @ C.T, (C @ L).square().sum(2), kl


def bernoulli(model: VGP, y: Tensor) -> Tensor:
    """Returns the negative ELBO under the likelihood of GPflow's probit link, by quadrature of 20 nodes."""
    nodes, weights = (torch.tensor(part) for part in pytest.importorskip("numpy").polynomial.hermite.hermgauss(20))
    mean, variance, kl = model()
    f = mean.unsqueeze(2) + (2 * variance).sqrt().unsqueeze(2) * nodes
    p = 0.5 * (1 + torch.erf(y.T.unsqueeze(2) * f / 2**0.5)) * (1 - 2e-3) + 1e-3
    negative: Tensor = kl - (p.log() @ weights).sum() / math.pi**0.5
    return negative


def gaussian(model: VGP, y: Tensor) -> Tensor:
    mean, variance, kl = model()
    negative: Tensor = kl + 0.5 * ((y.T - mean).square() + variance + math.log(2 * math.pi)).sum()
    return negative


class KerasAdam:
    """Adam with its epsilon beside the uncorrected root, and one count of steps for all that it ever stepped."""

    def __init__(self) -> None:
        self.steps = 0
        self.moments: dict[Tensor, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, *parameters: nn.Parameter) -> None:
        self.steps += 1
        rate = RATE * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        for p in parameters:
            assert p.grad is not None
            first, second = self.moments.setdefault(p, (torch.zeros_like(p), torch.zeros_like(p)))
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.001)
            p -= rate * first / (second.sqrt() + 1e-7)


def differentiate(model: VGP, loss: Callable[[VGP, Tensor], Tensor], y: Tensor) -> None:
    model.zero_grad()
    loss(model, y).backward()


def alternate(
    data: Data, loss: Callable[[VGP, Tensor], Tensor], adam: KerasAdam, gamma: float, parametrisation: Parametrisation
) -> float:
    """Returns the ELBO after two steps of Adam for the kernel, each before a natural step."""
    model = VGP(data[0])
    natural = VariationalNGD([(model.mean, model.root)], gamma=gamma, parametrisation=parametrisation)
    for _ in range(2):
        differentiate(model, loss, data[1])
        adam.step(model.variance_and_scale)
        differentiate(model, loss, data[1])
        natural.step()
    return -float(loss(model, data[1]).detach())


def test_gaussian_likelihood_gives_the_elbo_of_the_notebook_in_one_step(notebook: Data) -> None:
    x, _ = notebook
    y, model = torch.sin(10 * x), VGP(x)
    assert -float(gaussian(model, y).detach()) == pytest.approx(-328.8429385343547, abs=1e-6)

    differentiate(model, gaussian, y)
    VariationalNGD([(model.mean, model.root)], gamma=1.0).step()

    assert -float(gaussian(model, y).detach()) == pytest.approx(-231.08999824749554, abs=1e-6)


def test_bernoulli_likelihood_gives_the_elbos_of_the_notebook(notebook: Data) -> None:
    model, adam = VGP(notebook[0]), KerasAdam()
    for _ in range(2):
        differentiate(model, bernoulli, notebook[1])
        adam.step(*model.parameters())

    # The notebook goes on with the Adam of the first model in its second.
    natural = alternate(notebook, bernoulli, adam, 0.1, "natural")
    mean_root = alternate(notebook, bernoulli, KerasAdam(), 0.01, "mean_root")

    assert -float(bernoulli(model, notebook[1]).detach()) == pytest.approx(-193.44952193670616, abs=1e-6)
    assert natural == pytest.approx(-149.64640536202677, abs=1e-6)
    assert mean_root == pytest.approx(-170.92040759352284, abs=1e-6)


# --- the formula ------------------------------------------------------------------------------------------------------

M = 4


Pair = tuple[Tensor, Tensor]


def of_natural(theta1: Tensor, theta2: Tensor) -> Pair:
    """Returns (m, S) of theta = (S^-1 m, -S^-1 / 2)."""
    covariance = torch.linalg.inv(-2 * theta2)
    return covariance @ theta1, covariance


def of_expectation(eta1: Tensor, eta2: Tensor) -> Pair:
    return eta1, eta2 - torch.outer(eta1, eta1)


def expectation_of(mean: Tensor, covariance: Tensor) -> Pair:
    return mean, covariance + torch.outer(mean, mean)


# xi as a function of theta, and (m, S) as a function of xi.
COORDINATES: dict[Parametrisation, tuple[Callable[..., Pair], Callable[..., Pair]]] = {
    "natural": (lambda *theta: theta, of_natural),
    "expectation": (lambda *theta: expectation_of(*of_natural(*theta)), of_expectation),
    "mean_root": (
        lambda *theta: (of_natural(*theta)[0], torch.linalg.cholesky(of_natural(*theta)[1])),
        lambda mean, root: (mean, root @ root.T),
    ),
}


@pytest.mark.parametrize("parametrisation", COORDINATES)
def test_a_long_step_is_the_formula_by_automatic_derivatives(parametrisation: Parametrisation) -> None:
    """xi <- xi - gamma (d xi / d theta) dL / d eta, with both derivatives by torch."""
    torch.manual_seed(0)
    mean, root = torch.randn(M).double(), torch.eye(M).double() + 0.3 * torch.randn(M, M).double().tril()
    covariance, gamma = root @ root.T, 0.01

    def loss(m: Tensor, S: Tensor) -> Tensor:  # neither quadratic in m nor linear in S
        return (m + 1).exp().sum() + m @ S @ m + (S @ S).trace() - torch.logdet(S)

    by_eta = torch.func.grad(lambda eta: loss(*of_expectation(*eta)))(expectation_of(mean, covariance))
    by_eta = (by_eta[0], 0.5 * (by_eta[1] + by_eta[1].T))
    theta = (torch.linalg.solve(covariance, mean), -0.5 * torch.linalg.inv(covariance))
    xi_of, moments_of = COORDINATES[parametrisation]
    xi, change = torch.autograd.functional.jvp(xi_of, theta, by_eta)
    expected = moments_of(*(value - gamma * moved for value, moved in zip(xi, change, strict=True)))

    pair = nn.Parameter(mean.clone()), nn.Parameter(root.clone())
    loss(pair[0], pair[1].tril() @ pair[1].tril().T).backward()
    VariationalNGD([pair], gamma=gamma, parametrisation=parametrisation).step()

    assert not torch.allclose(pair[0], mean, atol=1e-2)
    assert torch.allclose(pair[0], expected[0], atol=1e-11)
    assert torch.allclose(pair[1] @ pair[1].T, expected[1], atol=1e-11)

"""The exact quadratic model equals one made of dense matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngd_dist.errors import ConfigError
from ngd_dist.step.quadratic import curvature_products, evaluate, predicted_change, solve_lengths
from tests.reference.generalised import flattened, gauss_newton
from tests.support.objectives import Tangent, objective_of, random_steps
from tests.support.tensors import F64


def dense_products(model: nn.Module, loss: Any, x: Tensor, y: Tensor, steps: list[Tangent]) -> Tensor:
    fisher = gauss_newton(model, loss, x, y)
    D = torch.stack([flattened([step[p] for p in model.parameters()]) for step in steps])
    return D @ fisher @ D.T


class Attention(nn.Module):
    """Tokens through torch's fused attention module, or through its functional kernel."""

    def __init__(self, is_functional: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.projection, self.is_functional = nn.Linear(4, 12), is_functional

    def forward(self, x: Tensor) -> Tensor:
        if self.is_functional:
            q, k, v = self.projection(x).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).mean(1)
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return mixed.mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class Hoarding(nn.Module):
    """Reads a weight from a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.hoard = [self.body.weight]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(F.linear(x, self.hoard[0], self.body.bias)))
        return logits


class Tied(nn.Module):
    """One weight in two modules, one module run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.decoder(torch.tanh(self.encoder(torch.tanh(self.encoder(x)))))
        return logits


class Checkpointed(nn.Module):
    def __init__(self, is_reentrant: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)
        self.is_reentrant = is_reentrant

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=self.is_reentrant))
        return logits


class Cube(torch.autograd.Function):
    """Differentiable backward as often as one likes, and not at all forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class OpaqueCube(Cube):
    """Its backward pass computes outside autograd, and autograd is not told."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient.detach()


class OnceCube(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cubed(nn.Module):
    def __init__(self, function: type[Cube]) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)]), function

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers[1](self.function.apply(self.layers[0](x)))
        return logits


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2).eval(), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "convolution": (convolutional, (6, 1, 4, 4)),
    "multihead": (lambda: Attention(is_functional=False), (6, 3, 4)),
    "sdpa": (lambda: Attention(is_functional=True), (6, 3, 4)),
    "lstm": (Recurrent, (6, 3, 4)),
    "hoarding": (Hoarding, (6, 4)),
    "tied": (Tied, (6, 4)),
    "checkpoint": (lambda: Checkpointed(is_reentrant=False), (6, 4)),
    "no forward mode": (lambda: Cubed(Cube), (6, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_gauss_newton_matrix(name: str) -> None:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().double()
    x, y = torch.randn(shape, dtype=F64), torch.randint(3, (6,))
    steps = random_steps(model)

    loss, products, slopes = curvature_products(model, objective_of(model, x, y), steps)

    exact = F.cross_entropy(model(x), y)
    torch.testing.assert_close(loss, exact.detach(), rtol=1e-12, atol=0)
    found = torch.autograd.grad(exact, list(model.parameters()), allow_unused=True, materialize_grads=True)
    gradients = dict(zip(model.parameters(), found, strict=True))
    along = torch.stack([sum(((gradients[p] * d).sum() for p, d in step.items()), torch.zeros(())) for step in steps])
    torch.testing.assert_close(slopes, along.double(), rtol=1e-10, atol=1e-12)
    expected = dense_products(model, F.cross_entropy, x, y, steps)
    torch.testing.assert_close(products, expected, rtol=1e-10, atol=1e-12)


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).sum(-1).mean() / 2


@pytest.mark.parametrize("loss", [squared_error, F.mse_loss, F.binary_cross_entropy_with_logits])
def test_the_output_hessian_is_that_of_the_loss_given(loss: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=F64), torch.rand(6, 3, dtype=F64)
    steps = random_steps(model, 1)

    _, products, _ = curvature_products(model, objective_of(model, x, y, loss), steps)

    torch.testing.assert_close(products, dense_products(model, loss, x, y, steps), rtol=1e-10, atol=1e-12)


def test_a_parameter_that_a_step_leaves_out_stays_where_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].weight.requires_grad_(False)
    objective = objective_of(model, torch.randn(6, 4, dtype=F64), torch.randint(3, (6,)))
    full = random_steps(model, 1)[0]
    kept = {p: full[p] for p in model[2].parameters()}

    _, partial, _ = curvature_products(model, objective, [kept, {}])
    _, padded, _ = curvature_products(model, objective, [{p: full[p] * (p in kept) for p in full}])

    torch.testing.assert_close(partial[0, 0], padded[0, 0], rtol=1e-12, atol=0)
    assert partial[1].tolist() == [0.0, 0.0]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda output: F.cross_entropy(output, torch.zeros(6, dtype=torch.long)), "got Tensor"),
        (lambda output: (0.5, output), r"got \(float, Tensor\)"),
        (lambda output: (output.sum(1), output), r"a loss of shape \[6\]"),
        (lambda output: ((output**2).sum().detach(), output), "loss doesn't depend on the weights"),
        (lambda output: ((output**2).sum(), output.detach()), "output doesn't depend on the weights"),
        (lambda output: ((output**2).sum(), output * 1), "must be computed from the output"),
        (lambda output: (output.sum(), output), "there is none .* return the model's output"),
        (lambda output: (OnceCube.apply(output).sum(), output), "there is none .* torch's own functions"),
    ],
)
def test_an_objective_without_a_usable_output_is_refused(result: Any, message: str) -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(6, 4)

    with pytest.raises(ConfigError, match=message):
        curvature_products(model, lambda: result(model(x)), random_steps(model, 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cubed(OnceCube), "neither by forward mode .* nor by differentiating backward twice .*step_length"),
        (lambda: Cubed(OpaqueCube), "neither by forward mode .* nor by differentiating backward twice .*step_length"),
        (lambda: Checkpointed(is_reentrant=True), "pass use_reentrant=False"),
    ],
)
def test_a_model_that_neither_mode_sees_through_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    objective = objective_of(model, torch.randn(6, 4), torch.randint(3, (6,)))

    with pytest.raises(ConfigError, match=message):
        curvature_products(model, objective, random_steps(model, 1))


def test_a_step_outside_the_model_is_refused() -> None:
    model, temperature = nn.Linear(4, 3), nn.Parameter(torch.ones(2))
    objective = objective_of(model, torch.randn(6, 4), torch.randint(3, (6,)))

    with pytest.raises(ConfigError, match=r"1 parameters that are not the model's, of shapes \[\[2\]\]"):
        curvature_products(model, objective, [{temperature: torch.ones(2)}])


# --- the solve --------------------------------------------------------------------------------------------------------


def spd(n: int) -> Tensor:
    rows = torch.randn(2 * n, n, dtype=F64)
    return rows.T @ rows / n


def test_lengths_minimise_the_model_in_the_plane() -> None:
    torch.manual_seed(0)
    fisher, D, grad = spd(7), torch.randn(2, 7, dtype=F64), torch.randn(7, dtype=F64)
    damped = fisher + 0.3 * torch.eye(7, dtype=F64)
    terms = (D @ fisher @ D.T, D @ D.T, D @ grad)

    lengths = solve_lengths(*terms, 0.3)

    # At the minimum the model's gradient, (F + lambda I) s + grad, is orthogonal to the plane.
    step = torch.tensor(lengths, dtype=F64) @ D
    torch.testing.assert_close(D @ (damped @ step + grad), torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)
    expected = float(step @ damped @ step / 2 + step @ grad)
    assert predicted_change(lengths, *terms, 0.3) == pytest.approx(expected, rel=1e-12)
    assert predicted_change(lengths, *terms, 0.0) == pytest.approx(
        float(step @ fisher @ step / 2 + step @ grad), rel=1e-12
    )


@pytest.mark.parametrize("small", [1e-12, 1.0])
@pytest.mark.parametrize("big", [1.0, 1e12])
def test_lengths_do_not_depend_on_the_scale_of_the_steps(small: float, big: float) -> None:
    torch.manual_seed(0)
    fisher, D, grad = spd(7), torch.randn(2, 7, dtype=F64), torch.randn(7, dtype=F64)
    scale = torch.tensor([big, small], dtype=F64)
    scaled = scale.unsqueeze(1) * D

    alpha, mu = solve_lengths(D @ fisher @ D.T, D @ D.T, D @ grad, 0.1)
    lengths = solve_lengths(scaled @ fisher @ scaled.T, scaled @ scaled.T, scaled @ grad, 0.1)

    assert lengths == pytest.approx((alpha / big, mu / small), rel=1e-9)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.0])
def test_a_last_step_that_adds_nothing_leaves_the_minimum_where_it_is(factor: float) -> None:
    torch.manual_seed(0)
    fisher, d, grad = spd(7), torch.randn(1, 7, dtype=F64), torch.randn(7, dtype=F64)
    D = torch.cat([d, factor * d])

    alone, none = solve_lengths(d @ fisher @ d.T, d @ d.T, d @ grad, 0.1)
    alpha, mu = solve_lengths(D @ fisher @ D.T, D @ D.T, D @ grad, 0.1)

    assert none == 0.0
    assert alpha + mu * factor == pytest.approx(alone, rel=1e-12)
    assert (mu == 0.0) == (factor == 0.0)


def test_numbers_that_are_not_finite_give_no_lengths() -> None:
    alpha, mu = solve_lengths(torch.full((2, 2), float("nan")), torch.eye(2), torch.ones(2), 0.1)

    assert alpha != alpha
    assert mu != mu


def test_the_newton_direction_reaches_the_minimum_of_a_linear_regression() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    x, y = torch.randn(20, 4, dtype=F64), torch.randn(20, 1, dtype=F64)
    objective = objective_of(model, x, y, squared_error)
    (grad,) = torch.autograd.grad(objective()[0], model.weight)
    newton = -torch.linalg.solve(x.T @ x / 20, grad.flatten()).view(1, 4)
    D = torch.cat([newton, torch.randn(1, 4, dtype=F64)])

    loss, DFD, _ = curvature_products(model, objective, [{model.weight: d.view(1, 4)} for d in D])
    lengths = solve_lengths(DFD, D @ D.T, D @ grad.flatten(), 0.0)
    with torch.no_grad():
        model.weight.add_(lengths[0] * newton)

    assert lengths == pytest.approx((1.0, 0.0), abs=1e-10)
    best = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(model.weight.detach(), best, rtol=1e-10, atol=1e-12)
    # The loss is its own quadratic model: rho is 1.
    predicted = predicted_change(lengths, DFD, D @ D.T, D @ grad.flatten(), 0.0)
    assert float(evaluate(model, objective) - loss) == pytest.approx(predicted, rel=1e-10)

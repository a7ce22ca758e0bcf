"""Sampled and exact output gradients have the Hessian of a sample's loss as their second moment."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_dist.capture.likelihood import exact_gradients, outputs_per_sample, sampled_gradients
from ngd_dist.config import Bernoulli, Categorical, Gaussian, LikelihoodChoice, Positions
from ngd_dist.errors import ConfigError
from tests.reference.generalised import output_hessian
from tests.support.tensors import F64

DRAWS = 50_000
VARIANCE = 0.7

# One sample of each kind of output: [1, C], [1, P, C], [1, C, H, W] with classes first; outputs [1], [1, O], [1, P, O].
CASES = [
    pytest.param(Categorical(), (1, 4), id="categorical"),
    pytest.param(Categorical(), (1, 3, 4), id="categorical-tokens"),
    pytest.param(Categorical(class_dim=1), (1, 3, 2, 2), id="categorical-pixels"),
    pytest.param(Bernoulli(), (1,), id="bernoulli-scalar"),
    pytest.param(Bernoulli(), (1, 4), id="bernoulli"),
    pytest.param(Bernoulli(), (1, 2, 3), id="bernoulli-positions"),
    pytest.param(Gaussian(variance=VARIANCE), (1, 4), id="gaussian"),
    pytest.param(Gaussian(variance=VARIANCE), (1, 2, 3), id="gaussian-positions"),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_output(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator(3)) * 1.5


def sample_loss(choice: LikelihoodChoice, output: Tensor, labels: Tensor, positions: Positions) -> Tensor:
    """Returns the loss of one sample by torch's own loss functions, reduced over positions as documented."""
    if isinstance(choice, Categorical):
        classes_first = output if choice.class_dim == 1 else output.movedim(-1, 1)
        return F.cross_entropy(classes_first, labels, reduction=positions)
    if isinstance(choice, Bernoulli):
        each = F.binary_cross_entropy_with_logits(output, labels, reduction="none")
    else:
        each = F.gaussian_nll_loss(output, labels, torch.full_like(output, VARIANCE), reduction="none")
    per_position = each.flatten(1, -2).sum(-1) if output.ndim > 2 else each.sum()
    return per_position.mean() if positions == "mean" else per_position.sum()


def any_labels(choice: LikelihoodChoice, output: Tensor) -> Tensor:
    if isinstance(choice, Categorical):
        return output.argmin(choice.class_dim)
    return (output > 0).to(F64)


def hessian(choice: LikelihoodChoice, output: Tensor, positions: Positions) -> Tensor:
    labels = any_labels(choice, output)
    return output_hessian(lambda z: sample_loss(choice, z, labels, positions), output)


@pytest.mark.parametrize("positions", ["mean", "sum"])
@pytest.mark.parametrize(("choice", "shape"), CASES)
def test_exact_columns_are_a_root_of_each_samples_hessian(
    choice: LikelihoodChoice, shape: tuple[int, ...], positions: Positions
) -> None:
    output = torch.cat([one_output(shape), -0.4 * one_output(shape)])

    columns = torch.stack(list(exact_gradients(choice, output, positions)))

    assert columns.shape == (outputs_per_sample(output), *output.shape)
    for n in range(2):
        flat = columns[:, n].reshape(len(columns), -1)
        torch.testing.assert_close(flat.T @ flat, hessian(choice, output[n : n + 1], positions), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("positions", ["mean", "sum"])
@pytest.mark.parametrize(("choice", "shape"), CASES)
def test_second_moment_of_sampled_gradients_tends_to_the_hessian(
    choice: LikelihoodChoice, shape: tuple[int, ...], positions: Positions
) -> None:
    output = one_output(shape)

    repeated = output.expand(DRAWS, *shape[1:])
    drawn = sampled_gradients(choice, repeated, generator(), positions).reshape(DRAWS, -1)

    products = torch.einsum("ni,nj->nij", drawn, drawn)
    error = (products.mean(0) - hessian(choice, output, positions)).abs()
    # Five standard errors of the mean, of at most 144 entries: one false alarm in 10^4 seeds, and the seed is fixed.
    assert bool((error <= 5 * products.std(0) / DRAWS**0.5 + 1e-12).all())
    # The mean of the gradients is 0, and so unbiased.
    assert bool((drawn.mean(0).abs() <= 5 * drawn.std(0) / DRAWS**0.5 + 1e-12).all())


@pytest.mark.parametrize(("choice", "shape"), CASES)
def test_a_sampled_gradient_is_that_of_the_loss_for_some_label(
    choice: LikelihoodChoice, shape: tuple[int, ...]
) -> None:
    output = one_output(shape).requires_grad_()

    sampled = sampled_gradients(choice, output, generator(), "sum")

    if isinstance(choice, Categorical):
        labels = (output.softmax(choice.class_dim) - sampled).argmax(choice.class_dim)
    elif isinstance(choice, Bernoulli):
        labels = (output.sigmoid() - sampled).round().detach()
    else:
        labels = (output - VARIANCE * sampled).detach()
    (expected,) = torch.autograd.grad(sample_loss(choice, output, labels, "sum"), output)
    torch.testing.assert_close(sampled, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("choice", "shape"), CASES)
def test_the_generator_alone_decides_what_is_drawn(choice: LikelihoodChoice, shape: tuple[int, ...]) -> None:
    output = one_output(shape).expand(50, *shape[1:])
    before = torch.get_rng_state()

    first, again, other = (sampled_gradients(choice, output, generator(seed), "mean") for seed in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("choice", "shape"), CASES)
def test_narrow_outputs_are_computed_in_float32(
    choice: LikelihoodChoice, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    output = one_output(shape).to(dtype)

    sampled = sampled_gradients(choice, output, generator(), "mean")
    columns = list(exact_gradients(choice, output, "mean"))

    assert torch.equal(sampled, sampled_gradients(choice, output.float(), generator(), "mean").to(dtype))
    for column, wide in zip(columns, exact_gradients(choice, output.float(), "mean"), strict=True):
        assert torch.equal(column, wide.to(dtype))


@pytest.mark.parametrize(("choice", "shape"), CASES)
def test_a_nan_comes_back_without_an_error(choice: LikelihoodChoice, shape: tuple[int, ...]) -> None:
    output = torch.cat([one_output(shape), one_output(shape).fill_(float("nan"))])

    sampled = sampled_gradients(choice, output, generator(), "mean")
    columns = torch.stack(list(exact_gradients(choice, output, "mean")))

    assert bool(sampled[0].isfinite().all())
    assert bool(sampled[1].isnan().any())
    assert bool(columns[:, 0].isfinite().all())
    assert bool(columns[:, 1].isnan().any())


def test_a_masked_class_is_never_drawn() -> None:
    output = torch.tensor([0.0, float("-inf"), -40.0], dtype=F64).expand(DRAWS, 3)

    sampled = sampled_gradients(Categorical(), output, generator(), "mean")

    assert bool((sampled[:, 1] == 0).all())
    assert all(bool(column.isfinite().all()) for column in exact_gradients(Categorical(), output[:1], "mean"))


@pytest.mark.parametrize("class_dim", [0, 2, -2, -3])
def test_a_class_dim_that_is_no_class_dim_is_refused(class_dim: int) -> None:
    choice = Categorical(class_dim=class_dim)

    with pytest.raises(ConfigError, match=rf"class_dim {class_dim} .* the shape \[5, 4\]"):
        sampled_gradients(choice, torch.zeros(5, 4), generator(), "mean")
    with pytest.raises(ConfigError, match=rf"class_dim {class_dim} "):
        exact_gradients(choice, torch.zeros(5, 4), "sum")


@pytest.mark.parametrize("positions", ["mean", "sum"])
def test_one_logit_per_sample_is_no_categorical(positions: Positions) -> None:
    with pytest.raises(ConfigError, match=r"class_dim -1 .* the shape \[5\]"):
        sampled_gradients(Categorical(), torch.zeros(5), generator(), positions)

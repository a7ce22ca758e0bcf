"""Normalisations by statistics that are not those of the input: running ones, and those of other ranks."""

import pytest
import torch
from torch import Tensor, nn

from ngd_dist import NGD
from ngd_dist.layers.batchnorm import normalisation_of
from ngd_dist.statistics.statistic import Key
from tests.support.layer_runs import autograd_sample_gradients, layers_of, sample_gradients, watched
from tests.support.tensors import F64


def test_batch_norm_statistics_leave_the_running_averages_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, 3)
    seen = []
    for watches in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 2))
        optimizer = NGD(model) if watches else None
        model(x).square().mean().backward()
        seen.append(model[0].running_var.clone())

    assert optimizer is not None
    assert len(optimizer._capture.take()) == 3
    assert torch.equal(*seen)


def test_a_batch_normalised_in_training_stays_so_when_eval_mode_comes_before_backward() -> None:
    torch.manual_seed(0)
    model, x = nn.BatchNorm1d(3).double(), torch.randn(5, 3, dtype=F64)
    values = []
    for mode in (True, False):
        optimizer = NGD(model)
        model.train()
        loss = model(x).pow(3).sum()
        model.train(mode)
        loss.backward()
        values.append(optimizer._capture.take()[Key("", "F")])

    assert torch.equal(*values)


def elsewhere_normalised(weight: Tensor, dtype: torch.dtype = F64) -> tuple[nn.BatchNorm2d, Tensor]:
    """Returns a norm whose statistics are not those of its input, as where other ranks have a part in them."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(len(weight)).eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.normal_()
    return norm.to(dtype), (3 * torch.randn(4, len(weight), 5, 5, dtype=F64) + 1).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_global_statistics_are_read_off_the_output(dtype: torch.dtype, tolerance: float) -> None:
    norm, x = elsewhere_normalised(torch.tensor([1.0, -0.3, 2.0]), dtype)
    wide = torch.float64 if dtype == F64 else torch.float32

    found = normalisation_of(x.to(wide), norm(x), norm.weight, norm.bias, norm.eps)

    columns = (value.view(-1, 1, 1) for value in (found.centre, found.factor, found.constant))
    centre, factor, constant = columns
    mean, variance = (value.to(wide).view(-1, 1, 1) for value in (norm.running_mean, norm.running_var))
    expected = (x.to(wide) - mean) / (variance + norm.eps).sqrt()
    torch.testing.assert_close((x.to(wide) - centre) * factor + constant, expected, rtol=tolerance, atol=tolerance)


def test_a_channel_that_is_scaled_by_nothing_gets_the_statistics_of_its_input() -> None:
    """Residual networks start with scales of 0."""
    norm, x = elsewhere_normalised(torch.tensor([1.0, 0.0, 1e-20], dtype=F64))

    found = normalisation_of(x, norm(x), norm.weight, norm.bias, norm.eps)

    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(found.factor[1:], (variance + norm.eps).rsqrt()[1:])
    torch.testing.assert_close(found.centre, mean)
    assert found.constant[1:].tolist() == [0, 0]
    assert found.constant[0] != 0


def test_a_constant_channel_is_finite() -> None:
    norm, x = elsewhere_normalised(torch.tensor([1.0, 0.5]))
    x[:, 1] = 3.0

    found = normalisation_of(x, norm(x), norm.weight, norm.bias, norm.eps)

    assert norm.running_mean is not None
    assert norm.running_var is not None
    expected = (3 - norm.running_mean[1]) / (norm.running_var[1] + norm.eps).sqrt()
    torch.testing.assert_close((x[0, 1, 0, 0] - found.centre[1]) * found.factor[1] + found.constant[1], expected)


def test_an_activation_in_place_after_a_synchronised_norm_does_no_harm() -> None:
    torch.manual_seed(0)
    norm, x = nn.SyncBatchNorm(3).double(), torch.randn(4, 3, 5, dtype=F64)
    activation = nn.ReLU(inplace=True)
    (layer,) = layers_of(norm)

    output, rows_of = watched([layer], lambda: activation(norm(x)), len(x))

    gradient = torch.randn_like(output)
    expected = autograd_sample_gradients(layer, output, gradient)
    torch.testing.assert_close(sample_gradients(layer, rows_of["layer"](gradient)), expected, rtol=1e-11, atol=1e-11)

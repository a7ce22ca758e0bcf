"""nn.ConvTranspose1d, 2d and 3d: rows of input pixels, and a layer of its own for the bias."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC
from ngd_dist.errors import CaptureError
from ngd_dist.layers import LAYERS, TransposedConv
from ngd_dist.statistics.statistic import Key
from tests.support.layer_runs import autograd_sample_gradients, layers_of, sample_gradients, watched
from tests.support.methods import SHIPPED
from tests.support.tensors import F64

N = 3
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.ConvTranspose1d(2, 3, 3), (N, 2, 5)),
    "1d stride beyond the kernel": (nn.ConvTranspose1d(2, 3, 2, stride=3, output_padding=2), (N, 2, 5)),
    "2d": (nn.ConvTranspose2d(2, 3, 3), (N, 2, 5, 4)),
    "2d stride": (nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3)), (N, 2, 4, 3)),
    "2d padding": (nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1), (N, 2, 4, 3)),
    "2d output padding": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=(1, 0)), (N, 2, 4, 3)),
    "2d dilation": (nn.ConvTranspose2d(2, 3, (2, 3), dilation=(3, 2), padding=(0, 2)), (N, 2, 4, 5)),
    "2d long output padding": (nn.ConvTranspose2d(2, 3, 2, stride=2, dilation=3, output_padding=2), (N, 2, 3, 3)),
    "2d groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (N, 4, 4, 3)),
    "2d depthwise": (nn.ConvTranspose2d(3, 3, 2, groups=3), (N, 3, 4, 4)),
    "3d": (nn.ConvTranspose3d(2, 3, (2, 1, 3), stride=(1, 2, 2), padding=(0, 0, 1)), (N, 2, 2, 3, 2)),
    "3d groups": (nn.ConvTranspose3d(4, 2, 2, groups=2, output_padding=1, dilation=2), (N, 4, 2, 2, 2)),
}  # fmt: skip


def case(name: str, *, has_bias: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module, shape = CASES[name]
    module = copy.deepcopy(module).double()
    if not has_bias:
        module.bias = None
    return module, torch.randn(shape, dtype=F64) + 0.5


def test_every_kind_has_a_case() -> None:
    assert {type(module) for module, _ in CASES.values()} == {m for m, k in LAYERS.items() if k is TransposedConv}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_rows_give_back_each_samples_gradient(name: str, has_bias: bool) -> None:
    module, x = case(name, has_bias=has_bias)
    layers = layers_of(module)
    output, rows_of = watched(layers, lambda: module(x), N)
    gradient = torch.randn_like(output)

    for layer in layers:
        rows = rows_of[layer.name](gradient)

        expected = autograd_sample_gradients(layer, output, gradient)
        torch.testing.assert_close(sample_gradients(layer, rows), expected, rtol=1e-12, atol=1e-12)
        direction = torch.randn(layer.shape.gradient, dtype=F64)
        along = torch.stack([torch.sum(direction * each) for each in expected])
        torch.testing.assert_close(rows.along(direction), along, rtol=1e-11, atol=1e-11)
        assert rows.count == rows.a_BNPI.shape[1] * rows.a_BNPI.shape[2]
    assert [layer.name for layer in layers] == ["layer", "layer.bias"][: 1 + has_bias]


def test_an_output_size_that_is_asked_for_is_seen() -> None:
    module = nn.ConvTranspose2d(2, 3, 3, stride=2).double()
    x = torch.randn(N, 2, 4, 4, dtype=F64)
    layers = layers_of(module)
    output, rows_of = watched(layers, lambda: module(x, output_size=(10, 9)), N)
    gradient = torch.randn_like(output)

    for layer in layers:
        expected = autograd_sample_gradients(layer, output, gradient)
        torch.testing.assert_close(sample_gradients(layer, rows_of[layer.name](gradient)), expected)


@pytest.mark.parametrize("name", CASES)
def test_split_undoes_join_for_one_layer_and_for_layers_side_by_side(name: str) -> None:
    module, _ = case(name)
    for layer in layers_of(module):
        for stacked in ((), (2,)):
            gradients = [torch.randn(*stacked, *p.shape, dtype=F64) for p in layer.parameters]
            joined = layer.join(gradients)
            assert joined.shape == (*stacked, *layer.shape.gradient)
            assert all(torch.equal(part, g) for part, g in zip(layer.split(joined), gradients, strict=True))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_kernel_of_one_steps_like_a_linear_layer_over_pixels(sharing: str) -> None:
    conv, x = nn.ConvTranspose2d(3, 2, 1, bias=False).double(), torch.randn(N, 3, 4, 4, dtype=F64)
    linear = nn.Linear(3, 2, bias=False).double()
    linear.weight = nn.Parameter(conv.weight.detach()[:, :, 0, 0].T.clone())
    gradient = torch.randn(N, 2, 4, 4, dtype=F64)

    for model in (conv, linear):
        config = NGDConfig(lr=1.0, momentum=0.0, damping=0.3, preconditioner=KFAC.model_validate({"sharing": sharing}))
        optimizer = NGD(model, config)
        output = conv(x) if model is conv else linear(x.movedim(1, -1)).movedim(-1, 1)
        (output * gradient).sum().div(N).backward()
        optimizer.step()

    torch.testing.assert_close(conv.weight[:, :, 0, 0].T, linear.weight, rtol=1e-11, atol=1e-12)


def test_the_factor_of_a_bias_is_the_second_moment_of_its_gradients() -> None:
    module, x = case("2d stride")
    optimizer = NGD(module)
    gradient = torch.randn_like(module(x))
    (module(x) * gradient).sum().div(N).backward()

    statistics = optimizer._capture.take()

    sums = gradient.sum((2, 3))
    torch.testing.assert_close(statistics[Key("bias", "G")][0], sums.T @ sums / N)
    torch.testing.assert_close(statistics[Key("bias", "A")], torch.ones(1, 1, 1, dtype=F64))


@pytest.mark.parametrize("method", SHIPPED)
def test_every_method_trains_a_decoder(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1), nn.Tanh(),
        nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1),
    )  # fmt: skip
    z, y = torch.randn(64, 4), torch.randn(64, 1, 8, 8)
    y = F.avg_pool2d(y, 3, 1, 1)
    clip = {"kind": "kl", "max_kl": 0.01}
    settings = {"lr": 0.03, "damping": 0.1, "clip": clip, "preconditioner": {"kind": method}}
    optimizer = NGD(model, NGDConfig.model_validate(settings))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(z) - y).square().sum((1, 2, 3)).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    assert len(optimizer.layers) == 5
    assert losses[-1] < 0.98 * losses[0]


def test_an_input_without_samples_is_refused() -> None:
    optimizer = NGD(nn.Sequential(nn.ConvTranspose1d(1, 2, 2)))

    with pytest.raises(CaptureError, match=r"\[samples, channels, length\], got \[1, 4\]"):
        optimizer.layers[0].module(torch.ones(1, 4))

"""The second moment of patches from the image's autocorrelation: as the patches say, entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ngd_dist.layers import autocorrelation
from ngd_dist.layers.autocorrelation import Window, is_worthwhile, patch_moment
from tests.reference.layers import patches
from tests.support.layer_runs import layers_of
from tests.support.tensors import F64

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AXIS = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 2), st.integers(0, 3), st.integers(0, 3))


def image(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def moment(rows_BND: Tensor) -> Tensor:
    return torch.einsum("bni,bnj->bij", rows_BND, rows_BND)


@settings(deadline=None)
@given(axes=st.lists(AXIS, min_size=1, max_size=3), channels=st.integers(1, 3), groups=st.integers(1, 2))
def test_the_moment_is_that_of_the_patches(axes: list[tuple[int, ...]], channels: int, groups: int) -> None:
    windows = [Window(size, kernel, step, (low, high)) for size, kernel, step, low, high in axes]
    windows = [window for window in windows if len(window.reads(0)) > 0] or [Window(3, 2, 1, (0, 1))]
    x = image(2, groups * channels, *(window.size for window in windows))

    found = patch_moment(x, windows, groups)

    kernel, dilation = [window.kernel for window in windows], [window.dilation for window in windows]
    wanted = moment(patches(x, kernel, dilation, [window.padding for window in windows], groups))
    # Sums of at most 216 products of size 1 that are taken apart and put together again.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dims", "settings"),
    [
        (2, {"kernel_size": 3, "padding": 1}),
        (2, {"kernel_size": (5, 3), "padding": (2, 0)}),
        (2, {"kernel_size": (2, 4), "padding": "same"}),
        (2, {"kernel_size": 3, "padding": "valid"}),
        (2, {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2}),
        (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
        (2, {"kernel_size": 1, "stride": 2}),
        (2, {"kernel_size": (3, 1), "stride": (1, 3), "padding": (1, 0)}),
        (1, {"kernel_size": 3, "padding": 1}),
        (3, {"kernel_size": (2, 3, 1), "padding": (0, 1, 0)}),
        (2, {"kernel_size": 3, "padding": 1, "stride": 2}),  # by its patches
    ],
)
def test_a_convolution_sums_its_inputs_as_its_rows_do(
    dims: int, settings: dict[str, object], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngd_dist.layers.conv.is_worthwhile", lambda *_: True)
    (layer,) = layers_of(CONV[dims](4, 6, bias=bias, **settings).double())  # type: ignore[arg-type]
    x = image(3, 4, *(7, 6, 5)[:dims])

    found = layer.input_moment(x)

    torch.testing.assert_close(found, moment(layer.inputs(x).flatten(1, 2)), rtol=1e-12, atol=1e-12)


def test_what_is_laid_out_channels_last_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, windows = image(3, 4, 6, 5), [Window(6, 3, 1, (1, 1)), Window(5, 3, 1, (1, 1))]

    turned = patch_moment(x.to(memory_format=torch.channels_last), windows, 2)

    torch.testing.assert_close(turned, patch_moment(x, windows, 2), rtol=1e-12, atol=1e-12)


def test_no_patch_is_made_where_the_image_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (layer,) = layers_of(nn.Conv2d(16, 16, 3, padding=1))
    monkeypatch.setattr(layer, "inputs", None)

    assert layer.input_moment(torch.ones(64, 16, 16, 16)).shape == (1, 145, 145)


@pytest.mark.parametrize(
    ("size", "kernel", "padding", "channels", "wins"),
    # Measured, 256 samples, one CPU thread: 3.3 ms for 1.6; 16 for 46; 19 for 38; 87 for 191.
    [(16, 3, 1, 1, False), (8, 3, 1, 32, True), (4, 3, 1, 64, True), (28, 5, 0, 6, True)],
)
def test_the_cheaper_way_is_taken(size: int, kernel: int, padding: int, channels: int, wins: bool) -> None:
    windows = [Window(size, kernel, 1, (padding, padding))] * 2

    assert is_worthwhile(windows, channels, samples=256) == wins


def test_a_same_convolution_needs_one_whole_sum_and_eight_strips() -> None:
    windows = (Window(16, 3, 1, (1, 1)),) * 2

    plan = autocorrelation._plan(windows)

    # Past the border lies nothing, so that only sums of lag 0 across it lose anything there.
    assert [tuple(len(strip.lags) for strip in strips) for strips in plan] == [
        (3, 5),
        *[(3, 1)] * 2,
        *[(1, 3), (1, 1), (1, 1)] * 2,
    ]

"""Second moment of a convolution's patches without the patches: from the autocorrelation of its input.

    moment[(c, k), (c', k')] = sum over n and p of x[n, c, p + k] x[n, c', p + k']

depends on k and k' only through the lag k' - k, except at the border: the sum runs over the pixels q = p + k, which are
the whole image without a few rows and columns. So the sum over all pixels is computed once per lag, and the strips that
a k leaves out are computed apart and subtracted. Each sum is a convolution's weight gradient, of the image with itself,
as fast as the library's convolutions. A square 3x3 kernel has 25 lags for its 81 pairs, and symmetry spares ten.

Axes: one entry per spatial axis, 1 to 3 of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

__all__ = ["Window", "is_worthwhile", "patch_moment"]

CONV_WEIGHT: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


class Window(NamedTuple):
    """One axis of a convolution with stride 1 and zero padding."""

    size: int
    kernel: int
    dilation: int
    padding: tuple[int, int]

    @property
    def reach(self) -> int:
        return self.dilation * (self.kernel - 1)

    def reads(self, k: int) -> range:
        """Returns the pixels that kernel offset k reads, padding included."""
        start = self.dilation * k - self.padding[0]
        return range(start, start + self.size + sum(self.padding) - self.reach)


@dataclass(frozen=True, slots=True)
class _Strip:
    """The pixels from start to stop of one axis, times `signs[k]` in the sum of kernel offset k, and their lags."""

    start: int
    stop: int
    signs: tuple[int, ...]
    lags: range


Strips = tuple[_Strip, ...]


def patch_moment(x: Tensor, windows: Sequence[Window], groups: int) -> Tensor:
    """Returns the sum over samples and positions of patch patch^T, [groups, I, I], I channels first, then kernel.

    x: [N, C, *sizes] of float32 or float64. As accurate as convolutions: on CUDA, torch.backends.cudnn.allow_tf32
    applies.
    """
    plan = _plan(tuple(windows))
    C = x.shape[1] // groups
    tables = [_correlation(x, windows, strips, groups).reshape(groups * C * C, -1) for strips in plan]
    sums = torch.cat(tables, dim=1) @ _gather(tuple(windows), x.dtype, x.device)
    offsets = prod(window.kernel for window in windows)
    half = sums.view(groups, C, C, offsets, offsets).transpose(2, 3).reshape(groups, C * offsets, C * offsets)
    return half + half.mT


def is_worthwhile(windows: Sequence[Window], channels: int, samples: int) -> bool:
    """Returns whether the sums over strips cost less than making the patches and multiplying them."""
    plan = _plan(tuple(windows))
    terms = sum(prod((s.stop - s.start) * len(s.lags) for s in strips) for strips in plan)
    positions = prod(len(window.reads(0)) for window in windows)
    inputs = channels * prod(window.kernel for window in windows)
    patches = samples * positions * inputs * (inputs + PATCH_COPY)
    return samples * terms * channels**2 + len(plan) * CALL < patches


# The time in which one CPU thread copies a number of a patch, and that of a call for one strip, in multiply-adds.
PATCH_COPY, CALL = 64, 6_000_000


@lru_cache(maxsize=256)
def _plan(windows: tuple[Window, ...]) -> tuple[Strips, ...]:
    return tuple(_combinations(windows, only_forward=True))


def _combinations(windows: Sequence[Window], *, only_forward: bool) -> Iterator[Strips]:
    """Yields a strip of each axis, with lags whose first number other than 0 is positive: symmetry gives the others.

    If an earlier axis has several lags, those of the later axes still come in pairs.
    """
    if not windows:
        yield ()
        return
    for strip in _strips(windows[0], only_forward=only_forward):
        if strip.lags:
            for others in _combinations(windows[1:], only_forward=only_forward and len(strip.lags) == 1):
                yield (strip, *others)


def _strips(window: Window, *, only_forward: bool) -> list[_Strip]:
    """Returns the whole axis, and each pixel at its ends that some kernel offset doesn't read."""
    size, kernel, dilation, _ = window
    offsets = range(kernel)
    first, last = (0 if only_forward else 1 - kernel), kernel - 1
    within = (size - 1) // dilation
    strips = [_Strip(0, size, (1,) * kernel, range(max(first, -within), min(last, within) + 1))]
    for q in range(size):
        missed = [k for k in offsets if q not in window.reads(k)]
        if missed:
            # A lag counts if it leads to another pixel, and from a missed offset to another offset.
            low = max(first, -(q // dilation), -missed[-1])
            high = min((size - 1 - q) // dilation, last - missed[0])
            signs = tuple(-1 if k in missed else 0 for k in offsets)
            strips.append(_Strip(q, q + 1, signs, range(low, high + 1)))
    return strips


def _correlation(x: Tensor, windows: Sequence[Window], strips: Strips, groups: int) -> Tensor:
    """Returns sum over n and q of x[n, c, q] x[n, c', q + lag], [C, C of the group, *lags], q in the strips."""
    strip_pixels, sides = x, list[int]()
    for axis, (window, strip) in enumerate(zip(windows, strips, strict=True)):
        strip_pixels = strip_pixels.narrow(2 + axis, strip.start, strip.stop - strip.start)
        first, last = strip.start + window.dilation * strip.lags[0], strip.stop + window.dilation * strip.lags[-1]
        sides = [-first, last - window.size, *sides]  # F.pad counts from the last axis, and crops if negative
    partner = F.pad(x, sides)
    shape = (x.shape[1], x.shape[1] // groups, *[len(strip.lags) for strip in strips])
    dilation = tuple(window.dilation for window in windows)
    if strip_pixels.shape == x.shape:
        return CONV_WEIGHT[len(windows)](partner, shape, strip_pixels, dilation=dilation, groups=groups)
    # A strip is too thin for a convolution's kernels: a third of the time as one product (256x16x16x16, 256x64x4x4).
    for axis, (step, pixels) in enumerate(zip(dilation, strip_pixels.shape[2:], strict=True)):
        partner = partner.unfold(2 + axis, pixels, step)
    dims = len(windows)
    strip_BCQ = strip_pixels.transpose(0, 1).reshape(groups, shape[1], -1)
    lag_axes, pixel_axes = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    partner_BLQ = partner.permute(1, *lag_axes, 0, *pixel_axes).reshape(groups, prod(shape[1:]), -1)
    return (strip_BCQ @ partner_BLQ.mT).view(shape)


@lru_cache(maxsize=256)
def _gather(windows: tuple[Window, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the weight of each sum in the half of the moment with k <= k', [sums, k * k']; half if k == k'."""
    kernel = tuple(window.kernel for window in windows)
    columns = {offset: number for number, offset in enumerate(product(*map(range, kernel)))}
    rows = []
    for strips in _plan(windows):
        for lag in product(*(strip.lags for strip in strips)):
            row = torch.zeros(len(columns), len(columns), dtype=torch.float64)
            for k, number in columns.items():
                other = tuple(i + step for i, step in zip(k, lag, strict=True))
                if k <= other and other in columns:
                    sign = prod(strip.signs[i] for strip, i in zip(strips, k, strict=True))
                    row[number, columns[other]] = sign / 2 if k == other else sign
            rows.append(row.flatten())
    return torch.stack(rows).to(device, dtype)

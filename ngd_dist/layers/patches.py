"""Images, and the patches of them that a kernel sees: shared by convolutions and transposed ones."""

from collections.abc import Sequence
from math import prod

from torch import Tensor

__all__ = ["image_of", "patch_rows", "windows_of"]

AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


def image_of(dims: int, x: Tensor) -> str | None:
    """Returns the shape that a batch of images of so many dimensions has, if x has another; else None."""
    return None if x.ndim == dims + 2 else f"[samples, channels, {AXES[dims]}]"


def windows_of(padded: Tensor, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Returns the patches of a padded image as a view, [N, C, *space, *kernel]."""
    for axis, (size, stride, dilation) in enumerate(zip(sizes, strides, dilations, strict=True)):
        padded = padded.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return padded


def patch_rows(windows: Tensor, groups: int, *, has_ones: bool = False) -> Tensor:
    """Returns patches [N, C, *space, *kernel] as rows [B, N, P, I], which lie in memory as [B, I, N, P].

    The innermost copy then runs along an axis of the image: 2 to 5 times as fast as F.unfold and its transpose
    (3x3 patches of 64x56x56 and of 16x16x16, one CPU thread), and as fast a factor of the rows for second moments.
    has_ones: whether a column of 1 comes last.
    """
    dims = (windows.ndim - 2) // 2
    samples, space = windows.shape[0], windows.shape[2 : 2 + dims]
    patch = (windows.shape[1] // groups, *windows.shape[2 + dims :])
    width = prod(patch)
    rows_BINP = windows.new_ones(groups, width + has_ones, samples, prod(space))
    target = rows_BINP[:, :width].unflatten(1, patch).unflatten(-1, space)
    # [N, C, *space, *kernel] -> [B, C of the group, *kernel, N, *space]
    grouped = windows.unflatten(1, (groups, patch[0]))
    kernel_axes, space_axes = range(3 + dims, 3 + 2 * dims), range(3, 3 + dims)
    target.copy_(grouped.permute(1, 2, *kernel_axes, 0, *space_axes))
    rows_BNPI: Tensor = rows_BINP.permute(0, 2, 3, 1)
    return rows_BNPI

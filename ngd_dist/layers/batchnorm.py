"""nn.BatchNorm1d, 2d, 3d and nn.SyncBatchNorm.

In training mode the batch statistics couple the samples. They are taken as given, as usual, so that the gradient of one
sample is an approximation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist.layers.norm import ChannelNorm

__all__ = ["BatchNorm", "SyncBatchNorm", "normalisation_of"]


class BatchNorm(ChannelNorm):
    """Normalises by the statistics of the batch or, in eval mode, by the running ones."""

    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

    def keep(self, x: Tensor, output: Tensor) -> tuple[Tensor, bool]:
        return x, self.module.training or self.module.running_mean is None

    def _normalised(self, kept: tuple[Tensor, bool]) -> Tensor:
        x, uses_batch = kept
        norm = self.module
        if not uses_batch:
            return F.batch_norm(x.to(self.dtype), norm.running_mean, norm.running_var, eps=norm.eps)
        # On a CPU a third of the time of F.batch_norm, and of torch.var_mean. Running averages don't move.
        x = x.to(self.dtype)
        x = x - x.mean([d for d in range(x.ndim) if d != 1], keepdim=True)
        of_samples = torch.linalg.vector_norm(x.flatten(2), dim=-1) if x.ndim > 2 else x
        variance = of_samples.square().sum(0) * (x.shape[1] / x.numel())
        return x.mul_((variance + norm.eps).rsqrt().view(-1, *[1] * (x.ndim - 2)))


class Normalisation(NamedTuple):
    """The map of each channel: (x - centre) * factor + constant. Each is [C]."""

    centre: Tensor
    factor: Tensor
    constant: Tensor


class SyncBatchNorm(ChannelNorm):
    """Normalises by the statistics of all ranks' batches, which are computed from its output."""

    module: nn.SyncBatchNorm

    def keep(self, x: Tensor, output: Tensor) -> tuple[Tensor, Normalisation]:
        norm = self.module
        mean, variance = norm.running_mean, norm.running_var
        if norm.training or mean is None or variance is None:
            # Now, since a following module may overwrite the output in place.
            return x, normalisation_of(x.to(self.dtype), output, self._weight, self._bias, norm.eps)
        factor = (variance.to(self.dtype) + norm.eps).rsqrt()
        return x, Normalisation(mean.to(self.dtype), factor, torch.zeros_like(factor))

    def _normalised(self, kept: tuple[Tensor, Normalisation]) -> Tensor:
        x, normalisation = kept
        centre, factor, constant = (value.view(-1, *[1] * (x.ndim - 2)) for value in normalisation)
        return (x.to(self.dtype) - centre) * factor + constant


def normalisation_of(x: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Normalisation:
    """Returns the normalisation of x before the scale and shift that gave the output, in the dtype of x.

    The output is linear in x: its slope and its mean show the statistics by which x was normalised. If the scale of a
    channel is 0, or too small beside its shift to be seen in the output, the channel gets the statistics of x.
    """
    dims = [dim for dim in range(x.ndim) if dim != 1]
    variance, centre = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = output.to(x.dtype)
    y_mean = y.mean(dims)
    covariance = ((x - centre) * (y - y_mean.view_as(centre))).mean(dims)
    variance, centre = variance.flatten(), centre.flatten()
    slope = torch.where(variance > 0, covariance / variance, 0)
    scale, shift = weight.to(x.dtype), torch.zeros_like(slope) if bias is None else bias.to(x.dtype)
    is_seen = scale.abs() > torch.finfo(output.dtype).eps * shift.abs()
    factor = torch.where(is_seen, slope / scale, (variance + eps).rsqrt())
    return Normalisation(centre, factor, torch.where(is_seen, (y_mean - shift) / scale, 0))

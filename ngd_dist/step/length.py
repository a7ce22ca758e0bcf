"""The length of a step along the directions: each layer's factor, clipping, and the sums over ranks that they need."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.capture.capture import Capture
from ngd_dist.config import KLClip, LayerWise, NGDConfig, NormClip
from ngd_dist.covered import CoveredLayers
from ngd_dist.distributed.comm import Communicator

__all__ = ["Factors", "StepLength", "kl_factor", "norm_factor"]


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors on the directions of a step. layers: of each layer, [layers]; clip: of all, 0-d; None for none."""

    layers: Tensor | None = None
    clip: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepLength:
    """Factors on the directions of the covered layers. `capture` has the rows that some configs need for them.

    has_pieces: whether a rank has pieces of the directions, of which the norm is over all ranks.
    """

    config: NGDConfig
    layers: CoveredLayers
    comm: Communicator
    capture: Capture
    has_pieces: bool = False

    @property
    def needs_rows(self) -> bool:
        """Whether the layers' rows must be kept until the step."""
        return isinstance(self.config.length, LayerWise)

    def inner(self, directions: Mapping[str, Tensor], gradients: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Returns <direction, gradient> of the given layers, [1, layers], 0 for the others; [0, layers] if unused."""
        if not (self.needs_rows or isinstance(self.config.clip, KLClip)):
            return like.new_empty(0, len(self.layers))
        products = [
            torch.dot(directions[name].flatten(), gradients[name].flatten()).to(like)
            if name in directions
            else like.new_zeros(())
            for name in self.layers
        ]
        return torch.stack(products).unsqueeze(0)

    def scale(self, directions: Mapping[str, Tensor], inner: Tensor) -> tuple[dict[str, Tensor], Factors]:
        """Collective under `layer_wise`, and for a norm of pieces. Returns the directions of all layers, each times its
        factor, and the factors."""
        scaled, factors = dict(directions), None
        if self.needs_rows and self.layers:
            factors = self._layer_wise(directions, inner[0])
            # Not squared: (alpha d)^T F (alpha d) = alpha d^T grad, since alpha is d^T grad / d^T F d.
            inner = inner * factors
            scaled = {name: scaled[name] * factor for name, factor in zip(self.layers, factors, strict=True)}
        clip = self._clip(scaled, inner)
        if clip is not None:
            scaled = {name: direction * clip for name, direction in scaled.items()}
        return scaled, Factors(factors, clip)

    def _layer_wise(self, directions: Mapping[str, Tensor], inner: Tensor) -> Tensor:
        """Returns d^T grad / (d^T F d + mu) per layer, F the empirical Fisher of the loss over all ranks' samples.

        It minimises the quadratic model alpha^2 / 2 d^T F d - alpha d^T grad. If no rank has rows of a layer, it gets
        1: it did not run, or its weights are used without its module. Source: [L24] eq. 12-13.
        """
        length = self.config.length
        assert isinstance(length, LayerWise)
        sums = torch.stack([self._along(name, directions[name]).to(inner) for name in self.layers], dim=1)
        self.comm.all_reduce("curvature along directions", sums, kind="step length")
        curvature, read, ranks = sums
        if self.config.loss_reduction == "mean":
            curvature = curvature / self.comm.world_size * self._factor(read / ranks.clamp(min=1))
        return torch.where(curvature > 0, inner / (curvature + length.mu), 1.0)

    def _along(self, name: str, direction_BOI: Tensor) -> Tensor:
        """Returns the mean over this rank's samples of (d^T gradient of the sample)^2; micro-batches weigh alike.

        With it the mean number of positions that the loss read, which has no part in it yet (see `Positions`), and 1 if
        there are rows: [3]. If the loss is summed over samples, the sum: its Fisher is that of all samples together.
        """
        total, micro_batches = direction_BOI.new_zeros(()), self.capture.layer_batches(name)
        if not micro_batches:
            return direction_BOI.new_zeros(3)
        for batch in micro_batches:
            squares = batch.along(direction_BOI).square()
            is_mean = self.config.loss_reduction == "mean"
            total = total + (squares.mean() / self._factor(batch.read) if is_mean else squares.sum() * batch.sharers)
        if self.config.loss_reduction == "mean":
            # If the divisor of each loss was not known when its rows were made, its square is the factor.
            divisor = len(micro_batches) if self.config.micro_batches == "any" else 1
            total = total * (divisor**2 / len(micro_batches))
        mean_read = sum(batch.read for batch in micro_batches) / len(micro_batches)
        return torch.stack([total, total.new_tensor(mean_read), total.new_ones(())])

    def _factor(self, read: float | Tensor) -> float | Tensor:
        """Returns the part that this number of positions has in squares of the loss's gradients."""
        return read if self.config.averages_positions else 1.0

    def _clip(self, directions: Mapping[str, Tensor], inner: Tensor) -> Tensor | None:
        clip = self.config.clip
        if not self.layers or clip is None:
            return None
        if isinstance(clip, NormClip):
            return norm_factor(directions.values(), clip.max_norm, self.comm if self.has_pieces else None)
        rates = inner.new_tensor([covered.lr**2 for covered in self.layers.values()])
        return kl_factor((rates * inner).sum(), clip.max_kl)


def kl_factor(inner: Tensor, max_kl: float) -> Tensor:
    """Returns nu = min(1, sqrt(max_kl / |inner|)), 0-d: the factor on every direction; 1 if inner is 0.

    inner: 0-d, the sum of lr^2 <direction, gradient> over all preconditioned layers of all ranks, with the gradient
        before momentum and weight decay.

    With direction = F^-1 gradient, inner is lr^2 direction^T F direction, twice the step's KL divergence. That is
    quadratic in the direction, hence the root: it becomes nu^2 inner <= max_kl. Source: KFAC-PyTorch's code.
    """
    return (max_kl / inner.abs()).sqrt().clamp(max=1)


def norm_factor(directions: Iterable[Tensor], max_norm: float, comm: Communicator | None = None) -> Tensor:
    """Returns min(1, max_norm / ||directions||) as a 0-d tensor: the norm is that of all of them as one vector.

    directions: at least one, on one device, the same on every rank that will multiply with the factor. With `comm`,
    which
        makes it collective, they are pieces, and the norm is that of all ranks' pieces.
    """
    tensors = list(directions)
    # Half precision overflows at 65504, and the factor would be 0.
    dtype = torch.float64 if any(d.dtype == torch.float64 for d in tensors) else torch.float32
    norm = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(tensors, 2, dtype))))
    if comm is not None:
        square = norm.square().view(1)
        comm.all_reduce("norm of directions", square, kind="step length")
        norm = square.sqrt()[0]
    factor: Tensor = (max_norm / norm).clamp(max=1)
    return factor

"""A factor of which the blocks along the diagonal are kept: all of it, if there is one."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import InputRows, Replicate
from ngd_dist.factors.kronecker import second_moment
from ngd_dist.factors.structure import Structure, least_norm

__all__ = ["BlockStructure"]


@dataclass(frozen=True)
class BlockStructure(Structure, Dense):
    """[B, K, R, R]: K blocks of R rows, of a matrix of `width` rows. The last block is filled up with zeros.

    A root has zeros there too, which stay: padding counts in no trace.
    """

    width: int

    @classmethod
    def of(cls, blocks: int, width: int, rows: int) -> "BlockStructure":
        """Returns the structure with blocks of so many rows at most."""
        rows = min(rows, width)
        return cls((blocks, -(-width // rows), rows, rows), width)

    def dense(self, value: Tensor) -> Tensor:
        whole = torch.stack([torch.block_diag(*blocks) for blocks in value.unbind()])
        return whole[:, : self.width, : self.width]

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        apart_BKMR, count = self._apart(rows_BNPD.flatten(1, 2)), self.shape[1]
        if isinstance(scale, torch.Tensor) and scale.numel() > 1:
            scale = scale.repeat_interleave(count)
        moment: Tensor = second_moment(apart_BKMR.flatten(0, 1).unsqueeze(2), scale).unflatten(0, (-1, count))
        return moment

    def input_moment(self, rows: InputRows) -> Tensor:
        if self.shape[1] == 1:
            return rows.input_moment_BII.div_(rows.samples).unsqueeze(1)
        return self.moment(rows.a_BNPI, 1 / rows.samples, rows.replicate)

    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        return value.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) / self.width

    def identity(self, scale_B: Tensor) -> Tensor:
        _, count, rows, _ = self.shape
        is_row = torch.arange(count * rows, device=scale_B.device) < self.width
        return scale_B.view(-1, 1, 1, 1) * torch.diag_embed(is_row.to(scale_B.dtype).view(count, rows))

    def conjugated(self, root: Tensor, value: Tensor) -> Tensor:
        return root.mT @ value @ root

    def squared(self, root: Tensor) -> Tensor:
        return root.mT @ root

    def product(self, root: Tensor, step: Tensor) -> Tensor:
        return root @ step

    def bound(self, step: Tensor) -> Tensor:
        return least_norm(step).amax(-1)

    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        together = (self._apart(matrix_BOn) @ inverse @ inverse.mT).transpose(1, 2).flatten(2)
        return together[..., : self.width].contiguous()

    @property
    def product_flops(self) -> int:
        return 4 * self.shape[-1]

    @property
    def inverse_flops(self) -> int:
        """Of a step of the root: four products."""
        blocks, count, rows, _ = self.shape
        return 8 * blocks * count * rows**3

    @property
    def row_numbers(self) -> int:
        return self.shape[0] * self.width

    def _apart(self, rows_BOn: Tensor) -> Tensor:
        """Returns the columns of each block, [B, K, O, R]."""
        _, count, rows, _ = self.shape
        padded = F.pad(rows_BOn, (0, count * rows - self.width))
        apart: Tensor = padded.unflatten(-1, (count, rows)).transpose(1, 2)
        return apart

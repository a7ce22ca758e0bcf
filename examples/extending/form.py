"""A form of your own: factors that are block-diagonal. python examples/extending/form.py"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.config import PreconditionerConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.form import FactorForm, Form, Replicate
from ngd_dist.inversion import ToInvert
from ngd_dist.preconditioners.kfac import KFAC

BLOCK = 2  # m


class BlockDiagonal(FactorForm):
    """[B, K, m, m]: K blocks on the diagonal of each of the B factors, K m wide."""

    @property
    def width(self) -> int:
        return self.shape[1] * self.shape[2]

    def dense(self, value: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*blocks) for blocks in value])

    def moment(self, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
        rows_BKRm = rows_BNPD.flatten(1, 2).unflatten(-1, self.shape[1:3]).transpose(1, 2)
        per_block = scale.view(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale
        return rows_BKRm.mT @ rows_BKRm * per_block

    def mean_eigenvalue(self, value: Tensor) -> Tensor:
        return value.diagonal(dim1=-2, dim2=-1).mean((-2, -1))

    @property
    def inverse(self) -> Form:
        return Dense((self.shape[0] * self.shape[1], *self.shape[2:]))

    def problem(self, value: Tensor, damping: Tensor, old: Tensor | None) -> ToInvert:
        return ToInvert(value.flatten(0, 1), damping.repeat_interleave(self.shape[1]), old)

    @property
    def basis(self) -> tuple[int, ...]:
        return self.shape[0], self.width, self.width

    def left(self, inverse: Tensor, matrix_BnI: Tensor) -> Tensor:
        in_blocks = matrix_BnI.reshape(-1, self.shape[-1], matrix_BnI.shape[-1])
        return (inverse @ in_blocks).view(matrix_BnI.shape)

    def right(self, matrix_BOn: Tensor, inverse: Tensor) -> Tensor:
        return self.left(inverse.mT, matrix_BOn.mT.contiguous()).mT

    @property
    def product_flops(self) -> int:
        return 2 * self.shape[-1]

    @property
    def inverse_flops(self) -> int:
        return 2 * self.shape[0] * self.shape[1] * self.shape[-1] ** 3


class Blocks(PreconditionerConfig):
    """The settings of K-FAC with block-diagonal factors."""

    kind: Literal["blocks"] = "blocks"
    method: ClassVar[str] = f"{__name__}:InBlocks"
    thresholds: ClassVar[Mapping[str, float]] = KFACConfig.thresholds
    damping_form: Literal["pi", "exact"] = "pi"


class InBlocks(KFAC):
    """K-FAC in all but the form of A and of G."""

    def __init__(self, shape: LayerShape, config: Blocks | KFACConfig, max_dense: int) -> None:
        super().__init__(shape, KFACConfig(damping_form=config.damping_form), max_dense)

    def forms(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> Mapping[str, FactorForm]:
        widths = {"A": shape.inputs, "G": shape.outputs}
        return {name: BlockDiagonal((shape.blocks, n // BLOCK, BLOCK, BLOCK)) for name, n in widths.items()}


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Tanh(), nn.Linear(32, 4, bias=False))
    optimizer = NGD(model, NGDConfig(preconditioner=Blocks(), lr=0.1, damping=0.01))
    x = torch.randn(256, 8)
    y = (x[:, :4] + x[:, 4:]).argmax(1)
    for step in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()

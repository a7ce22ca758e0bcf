"""A method of your own: the diagonal of the Fisher. python examples/extending/method.py"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import PreconditionerConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import Entrywise, Form
from ngd_dist.inversion import Ending, Solution
from ngd_dist.layers import LayerBatch
from ngd_dist.preconditioners import Cache, Preconditioner, Refreshed
from ngd_dist.statistics.statistic import StatisticSpec


class Diagonal(PreconditionerConfig):
    """The settings: none. The class below carries them out, for every layer that has no block of another kind."""

    kind: Literal["diagonal"] = "diagonal"
    method: ClassVar[str] = f"{__name__}:DiagonalFisher"
    thresholds: ClassVar[Mapping[str, float]] = {"D": 0.2}


class DiagonalFisher(Preconditioner):
    """D = (1/N) sum over samples of grad^2, entry by entry; the direction is grad / (D + damping)."""

    def __init__(self, shape: LayerShape, config: Diagonal, max_dense: int) -> None:
        super().__init__(shape)
        self.statistics = (StatisticSpec("D", Entrywise(shape.gradient)),)
        self.entries = {"inverse": Form(shape.gradient)}

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        if "D" not in due:
            return {}
        # Shapes: B blocks, N samples, P positions, I inputs, O outputs. A sample's gradient is a sum over positions.
        gradients_BNOI = batch.g_BNPO.mT @ batch.a_BNPI
        return {"D": gradients_BNOI.square().sum(1) / batch.samples}

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        inverse = (statistics["D"] + damping).reciprocal()
        if not bool(torch.isfinite(inverse).all()):
            return Refreshed(old, {"D": Ending.NON_FINITE})
        return Refreshed({"inverse": inverse}, {"D": Ending.OK})

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        return cache["inverse"] * grad_BOI

    def refresh_flops(self) -> int:
        return 2 * self.apply_flops()

    def apply_flops(self) -> int:
        return self.shape.blocks * self.shape.outputs * self.shape.inputs


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = NGD(model, NGDConfig(preconditioner=Diagonal(), lr=0.02))
    x = torch.randn(256, 8)
    y = (x[:, :4] + x[:, 4:]).argmax(1)
    for step in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(optimizer.explain())


if __name__ == "__main__":
    main()

"""A layer of your own: one linear map for all patches of a signal. python examples/extending/layer.py"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers import Layer, Linear, register_layer


class Patches(nn.Module):
    """x [N, patches * length] -> y [N, patches, outputs]."""

    def __init__(self, length: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, length) / length**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.cut(x), self.weight, self.bias)

    def cut(self, x: Tensor) -> Tensor:
        length = self.weight.shape[1]
        return x.reshape(len(x), -1, length)


class PatchesLayer(Layer):
    """How K-FAC and the other methods read `Patches`: a sample's patches are positions that share the weight."""

    module: Patches

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim == 2 else "[samples, patches * length]"

    @property
    def shape(self) -> LayerShape:
        outputs, length = self.module.weight.shape
        return LayerShape(self.name, "kronecker", inputs=length + 1, outputs=outputs)  # the bias is the last input

    def inputs(self, kept: Tensor) -> Tensor:
        # Shapes: B blocks (one here), N samples, P positions, I inputs, O outputs. The input 1 of the bias comes last.
        a_NPI = F.pad(self.module.cut(kept).to(self.dtype), (0, 1), value=1.0)
        return a_NPI.unsqueeze(0)

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        g_NPO = g.to(self.dtype)
        return g_NPO.unsqueeze(0)


class NamedLinear(nn.Linear):
    """A subclass that computes what nn.Linear does. The match is on the exact type, so it says so below."""


register_layer(Patches, PatchesLayer)
register_layer(NamedLinear, Linear)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Patches(4, 8), nn.Tanh(), nn.Flatten(), NamedLinear(32, 4))
    optimizer = NGD(model, NGDConfig(lr=0.05))
    x = torch.randn(256, 16)
    y = x.unflatten(1, (4, 4)).sum(2).argmax(1)
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

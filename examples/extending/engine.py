"""An engine of your own: a wrapper that averages gradients over ranks. python examples/extending/engine.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.engines import ENGINES, Engine


class Averaged(nn.Module):
    """Runs a model, and makes each gradient the mean over ranks as soon as it is there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.average)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x)
        return output

    @staticmethod
    def average(p: Tensor) -> None:
        if p.grad is not None and dist.is_initialized():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


class AveragedEngine(Engine):
    """Tells NGD which model is inside, and that its gradients are means already."""

    averages_gradients = True
    averager = "Averaged"

    def inside(self, model: nn.Module) -> nn.Module | None:
        return model.model if isinstance(model, Averaged) else None


ENGINES.append(AveragedEngine())


def main() -> None:
    torch.manual_seed(0)
    model = Averaged(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)))
    optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.01))
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

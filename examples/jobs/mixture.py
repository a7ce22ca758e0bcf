"""A density by natural gradients as a job: `train: {function: mixture:train}`; each worker starts elsewhere."""

import torch
import torch.distributed as dist
from torch import Tensor

from ngd_dist.exact.metrics import FisherRao, Grid
from ngd_dist.exact.state_space import StateSpaceNGD
from ngd_workers.train.own_loop import LoopContext

CELLS, WIDTH = 200, 0.1
X = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * WIDTH - 10


def density(theta: Tensor) -> Tensor:
    """Returns the mixture of means, log widths and log weights, theta [3 n], on the grid [200]."""
    means, widths, weights = theta.view(3, -1, 1)
    x = X.to(theta.device)
    rho = (weights.softmax(0) / widths.exp() * torch.exp(-0.5 * ((x - means) / widths.exp()) ** 2)).sum(0)
    return rho / (rho.sum() * WIDTH)


def draw(seed: int, count: int) -> Tensor:
    unit = torch.randn(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (unit * torch.tensor([[3.0], [0.3], [0.5]])).flatten()


def train(context: LoopContext) -> None:
    """Fits a mixture of `bells` bells to another, by the KL divergence; the job's loss is that of the best rank."""
    count = context.config["bells"]
    target = density(draw(context.seed, count).to(context.device))
    floor = 1e-12

    def loss(rho: Tensor) -> Tensor:
        return (target * ((target + floor).log() - (rho + floor).log())).sum() * WIDTH

    optimizer = StateSpaceNGD(FisherRao(Grid((CELLS,), (WIDTH,)), floor=1e-6), density, loss, damping=1e-4)
    thetas = torch.stack([draw(context.seed + 1 + rank, count) for rank in range(context.world_size)])
    if (state := context.resume()) is not None:
        thetas = state["thetas"]
    theta = thetas[context.rank % len(thetas)].to(context.device)

    while context.step < context.config["steps"]:
        step = optimizer.step(theta)
        theta, best = step.theta, torch.tensor([step.loss], dtype=torch.float64, device=context.device)
        thetas = [torch.empty_like(theta) for _ in range(context.world_size)]
        if context.process_group is None:
            thetas = [theta]
        else:
            dist.all_gather(thetas, theta, group=context.process_group)
            dist.all_reduce(best, dist.ReduceOp.MIN, group=context.process_group)
        context.report({"loss": best})
        is_tested = context.step % 10 == 0
        if is_tested:  # the job's target is compared with tests
            context.report({"loss": best}, test=True)
        stops = context.should_stop()
        if is_tested or stops:
            context.checkpoint({"thetas": torch.stack(thetas)})
        if stops:
            return

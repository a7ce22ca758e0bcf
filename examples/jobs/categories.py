"""Logistic regression on categories as a job: `train: {function: categories:train}`, on any number of workers."""

import torch
import torch.distributed as dist
from torch import Tensor

from ngd_dist.exact.dually_flat import DuallyFlatRegression
from ngd_workers.train.own_loop import LoopContext


def gathered(own: Tensor, context: LoopContext) -> Tensor:
    """Returns the rows of all ranks."""
    if context.process_group is None:
        return own
    parts = [torch.empty_like(own) for _ in range(context.world_size)]
    dist.all_gather(parts, own, group=context.process_group)
    return torch.cat(parts)


def train(context: LoopContext) -> None:
    """Learns a random model from its samples; each rank draws its own, and all take the step of all samples."""
    sizes, classes, batch = context.config["sizes"], context.config["classes"], context.config["batch"]
    truth, model = (DuallyFlatRegression(sizes, classes, device=context.device) for _ in range(2))
    first = torch.Generator().manual_seed(context.seed)
    for table in (truth.alpha_S, truth.beta_MS):
        table.copy_(torch.randn(table.shape, generator=first))
    every_x = torch.cartesian_prod(*map(torch.arange, sizes)).to(context.device)
    joint = truth.logits(every_x).flatten().softmax(0).view(-1, classes)
    if (state := context.resume()) is not None:
        model.load_state_dict(state)

    while context.step < context.config["steps"]:
        # A generator of the step and the rank: an attempt that goes on draws what the one before it would have drawn.
        generator = torch.Generator().manual_seed((context.step * context.world_size + context.rank) * 2_147_483_659)
        count = batch // context.world_size
        drawn = torch.multinomial(joint.flatten().cpu(), count, replacement=True, generator=generator)
        drawn = gathered(drawn.to(context.device), context)
        loss = model.step(every_x[drawn // classes], drawn % classes)
        context.report({"loss": loss}, samples=len(drawn))
        is_tested = context.step % 10 == 0
        if is_tested:
            gap = truth.logits(every_x).log_softmax(1) - model.logits(every_x).log_softmax(1)
            context.report({"divergence": (joint * gap).sum()}, test=True)
        stops = context.should_stop()
        if is_tested or stops:
            context.checkpoint(model.state_dict())
        if stops:
            return

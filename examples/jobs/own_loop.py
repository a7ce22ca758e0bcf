"""A loop of one's own, as a job calls it: `train: {function: own_loop:train}`."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import NGD, NGDConfig
from ngd_workers.train.own_loop import LoopContext


def train(context: LoopContext) -> None:
    """Learns y = sin(x); each rank takes its own points."""
    model = nn.Sequential(nn.Linear(1, context.config["width"]), nn.Tanh(), nn.Linear(context.config["width"], 1))
    model.to(context.device)
    wrapped = model if context.process_group is None else DistributedDataParallel(model)
    optimizer = NGD(wrapped, NGDConfig(lr=0.1, damping=0.1))
    if (state := context.resume()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    while context.step < context.config["steps"]:
        points = torch.Generator().manual_seed(1000 * context.step + context.rank)
        x = 6 * torch.rand(64, 1, generator=points).to(context.device) - 3
        optimizer.zero_grad()
        loss = (wrapped(x) - x.sin()).square().mean()
        loss.backward()
        optimizer.step()
        context.report({"loss": loss}, samples=64 * context.world_size)
        is_tested = context.step % 50 == 0
        if is_tested:
            x = torch.linspace(-3, 3, 101, device=context.device).unsqueeze(1)
            with torch.no_grad():
                context.report({"loss": (model(x) - x.sin()).square().mean()}, test=True)
        stops = context.should_stop()
        if is_tested or stops:
            context.checkpoint({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if stops:
            return

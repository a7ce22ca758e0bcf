"""NGD with fully_shard (FSDP2). Run: torchrun --standalone --nproc-per-node 2 examples/fsdp2.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from ngd_dist import NGD, NGDConfig

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same prototypes on every rank
prototypes = torch.randn(10, 64)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
torch.manual_seed(1 + dist.get_rank())  # each rank's own part of the batch

for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.1))  # after fully_shard, before the first forward pass
for step in range(61):
    labels = torch.randint(10, (128,))
    loss = F.cross_entropy(model(prototypes[labels] + 2 * torch.randn(128, 64)), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 10 == 0:
        print(f"step {step} loss {loss.item():.4f}")

dist.destroy_process_group()

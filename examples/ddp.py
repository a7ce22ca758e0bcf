"""NGD with DistributedDataParallel. Run: torchrun --standalone --nproc-per-node 2 examples/ddp.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import PolynomialLR

from ngd_dist import NGD, NGDConfig

STEPS = 60

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same prototypes on every rank
prototypes = torch.randn(10, 64)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))

optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.1))  # every rank builds it, and every rank steps
scheduler = PolynomialLR(optimizer, total_iters=STEPS)

torch.manual_seed(1 + dist.get_rank())  # each rank's own part of the batch
for step in range(STEPS):
    labels = torch.randint(10, (128,))
    inputs = prototypes[labels] + 2 * torch.randn(128, 64)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    scheduler.step()
    if dist.get_rank() == 0 and (step % 10 == 0 or step == STEPS - 1):
        print(f"step {step} loss {loss.item():.4f}")

dist.destroy_process_group()

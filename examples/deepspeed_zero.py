"""NGD with DeepSpeed ZeRO. Run: torchrun --standalone --nproc-per-node 2 examples/deepspeed_zero.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from ngd_dist import NGD, NGDConfig
from ngd_dist.engines.deepspeed import initialize

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights and prototypes on every rank
prototypes = torch.randn(10, 64)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
torch.manual_seed(1 + dist.get_rank())  # each rank's own part of the batch

engine = initialize(model, {"train_micro_batch_size_per_gpu": 128, "zero_optimization": {"stage": 2}})
optimizer = NGD(engine, NGDConfig(lr=0.1, damping=0.1))
for step in range(61):
    labels = torch.randint(10, (128,))
    loss = F.cross_entropy(engine(prototypes[labels] + 2 * torch.randn(128, 64)), labels)
    engine.backward(loss)
    engine.step()  # calls the optimizer's
    if not engine.was_step_applied():  # float16 overflowed
        optimizer.skip()
    if dist.get_rank() == 0 and step % 10 == 0:
        print(f"step {step} loss {loss.item():.4f}")

dist.destroy_process_group()

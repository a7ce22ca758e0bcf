"""What does one step cost the process, in CPU milliseconds, with the ngd_dist of one checkout?

Run: python bench.py CHECKOUT mlp|deep|conv EVERY, for two checkouts in turn, with OMP_NUM_THREADS=1.
"""

import sys
import time
from itertools import pairwise

sys.path.insert(0, sys.argv[1])
import torch
import torch.nn.functional as F
from torch import nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval

what, every = sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
if what == "mlp":
    widths = [784, 512, 512, 512]
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    model, x = nn.Sequential(*hidden, nn.Linear(512, 10)), torch.randn(256, 784)
elif what == "deep":  # 121 small layers: the host's work for each
    blocks = [m for _ in range(60) for m in (nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU())]
    model, x = nn.Sequential(*blocks, nn.Linear(32, 10)), torch.randn(32, 32)
else:
    blocks = [m for _ in range(6) for m in (nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
    model, x = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16 * 64, 10)), torch.randn(64, 16, 8, 8)
y = torch.randint(10, (x.shape[0],))
optimizer = NGD(model, NGDConfig(lr=1e-3, staleness=FixedInterval(steps=every)))


def step() -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


for _ in range(12):
    step()
start = time.process_time()
for _ in range(40):
    step()
print(f"{(time.process_time() - start) / 40 * 1e3:.2f}")

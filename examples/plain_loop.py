"""NGD in a plain training loop. Run: python examples/plain_loop.py"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import PolynomialLR

from ngd_dist import NGD, NGDConfig

STEPS = 60

torch.manual_seed(0)
prototypes = torch.randn(10, 1, 8, 8)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10)
)

optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.1))
scheduler = PolynomialLR(optimizer, total_iters=STEPS)

for step in range(STEPS):
    labels = torch.randint(10, (256,))
    images = prototypes[labels] + 2 * torch.randn(256, 1, 8, 8)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step} loss {loss.item():.4f}")

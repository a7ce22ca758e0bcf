"""The natural gradient before another optimizer. Run: python examples/preconditioner.py"""

import torch
from torch import nn
from torch.nn import functional as F

from ngd_dist import NGDConfig, Preconditioner

torch.manual_seed(0)
prototypes = torch.randn(10, 64)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

preconditioner = Preconditioner(model, NGDConfig(damping=0.1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for step in range(61):
    labels = torch.randint(10, (256,))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(prototypes[labels] + 2 * torch.randn(256, 64)), labels)
    loss.backward()
    if preconditioner.step():  # the gradients are natural now
        optimizer.step()
    if step % 10 == 0:
        print(f"step {step} loss {loss.item():.4f}")

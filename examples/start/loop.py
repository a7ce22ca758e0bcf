import torch
from torch import nn


def spirals(samples, seed):
    """Returns points, float32 [samples, 2], and on which of three spiral arms each lies."""
    draw = torch.Generator().manual_seed(seed)
    arm = torch.randint(3, (samples,), generator=draw)
    radius = torch.rand(samples, generator=draw)
    angle = 4 * radius + 2 * torch.pi / 3 * arm + 0.1 * torch.randn(samples, generator=draw)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), arm


torch.manual_seed(0)
x, y = spirals(4096, seed=0)
test_x, test_y = spirals(1000, seed=1)
model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

for step in range(1, 81):
    batch = torch.randint(len(x), (512,))
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        accuracy = (model(test_x).argmax(1) == test_y).float().mean()
        print(f"step {step}  loss {loss:.3f}  test accuracy {accuracy:.3f}")

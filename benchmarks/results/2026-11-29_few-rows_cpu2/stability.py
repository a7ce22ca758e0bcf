"""Does a fixed interval of ten diverge on digits, where the adaptive one does not? Loss after 100 steps, three seeds.

Run: OMP_NUM_THREADS=1 python stability.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.errors import NgdError

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[:1500]
X, Y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
SCHEDULES = {"fixed 10": {"kind": "fixed", "steps": 10}, "adaptive": {"kind": "adaptive"}}
VARIANTS = {
    "plain": {},
    "clip kl 0.01": {"clip": {"kind": "kl", "max_kl": 0.01}},
    "momentum 0": {"momentum": 0.0},
    "monte carlo": {"fisher": {"kind": "monte_carlo"}},
}


def loss_after(seed: int, **settings: object) -> str:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer, draws = NGD(model, NGDConfig.model_validate(settings)), torch.Generator().manual_seed(seed)
    for step in range(100):
        chosen = torch.randint(len(X), (256,), generator=draws)
        optimizer.zero_grad()
        output = model(X[chosen])
        optimizer.fisher_backward(output)
        F.cross_entropy(output, Y[chosen]).backward()
        try:
            optimizer.step()
        except NgdError:
            return f"overflows in step {step + 1}"
    return f"{float(F.cross_entropy(model(X), Y).detach()):.1e}"


torch.set_num_threads(1)
print("| | schedule | lr 0.1, damping 0.03 | lr 0.03, damping 0.03 | lr 0.1, damping 0.1 |\n|---|---|---|---|---|")
for name, variant in VARIANTS.items():
    for schedule, staleness in SCHEDULES.items():
        cells = [
            ", ".join(loss_after(seed, lr=lr, damping=damping, staleness=staleness, **variant) for seed in range(3))
            for lr, damping in ((0.1, 0.03), (0.03, 0.03), (0.1, 0.1))
        ]
        print(f"| {name} | {schedule} | {' | '.join(cells)} |", flush=True)

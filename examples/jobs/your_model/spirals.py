"""On which of three spiral arms does a point lie? A model, data and a task of one's own."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from ngd_dist.config import Categorical
from ngd_workers.contract.events import Metric
from ngd_workers.tasks.base import LOSS, Result, Task

ARMS = 3


class Points(Dataset):
    """Samples are pairs: a point, float32 [2], and the number of its arm."""

    def __init__(self, samples, seed):
        draw = torch.Generator().manual_seed(seed)
        self.arm = torch.arange(samples) % ARMS
        radius = torch.rand(samples, generator=draw)
        angle = 4 * radius + 2 * math.pi / ARMS * self.arm + 0.1 * torch.randn(samples, generator=draw)
        self.point = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

    def __len__(self):
        return len(self.arm)

    def __getitem__(self, index):
        return self.point[index], self.arm[index]


def data(samples=3000):
    """Returns the training data and the test data."""
    return Points(samples, seed=0), Points(600, seed=1)


def model(shape, width=64):
    """Returns the model. shape: of a Dataset that tells it; here there is nothing to know."""
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, ARMS))


class WhichArm(Task):
    metrics = (Metric(name="accuracy", label="accuracy", better="higher", unit="share"), LOSS)
    likelihood = Categorical()

    def __init__(self, shape):
        pass

    def train_batch(self, model, batch):
        x, y = batch
        logits = model(x)
        hits = (logits.detach().argmax(1) == y).sum()
        return Result(F.cross_entropy(logits, y), len(y), logits, sums={"hits": hits})

    def summarize(self, sums, count):
        return {"accuracy": float(sums["hits"]) / count}

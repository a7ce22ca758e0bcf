"""The tasks of `steps_to_target`: data in memory, a model, its loss, and the target."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import digits, mlp, resnet20
from benchmarks.target_search import Range
from ngd_workers.contract.spec import IDX
from ngd_workers.data import load_dataset

__all__ = ["TASKS", "Data", "Task", "loss_of"]

EVALUATION_BATCH = 2500


@dataclass(frozen=True, slots=True)
class Data:
    """Inputs [samples, ...] and labels [samples] or, of a sequence, [samples, positions]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, slots=True)
class Task:
    """One question: seconds and steps until the model's score reaches `target`.

    measure: accuracy or loss on the test part, or loss on the training part. every: steps between two evaluations, the
    resolution of every count. steps: the range of the lengths that schedules are drawn from. seconds: CPU time after
    which a run has missed the target. trials: of each method; fewer where a run takes a minute.
    """

    title: str
    load: Callable[[Path], Data]
    model: Callable[[], nn.Module]
    batch: int
    measure: Literal["test accuracy", "test loss", "training loss"]
    target: float
    every: int
    steps: Range
    seconds: float
    trials: int = 16

    def is_reached(self, score: float) -> bool:
        """Returns whether the score is as good as the target."""
        return score >= self.target if self.measure == "test accuracy" else score <= self.target

    @torch.no_grad()
    def score(self, model: nn.Module, data: Data) -> float:
        """Returns the measure: a mean over all samples of its part."""
        x, y = (data.train_x, data.train_y) if self.measure == "training loss" else (data.test_x, data.test_y)
        model.eval()
        total = 0.0
        for inputs, labels in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True):
            output = model(inputs)
            if self.measure == "test accuracy":
                total += int((output.argmax(-1) == labels).sum())
            else:
                total += float(loss_of(output, labels)) * len(inputs)
        model.train()
        return total / len(x)


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Returns the cross-entropy, a mean over samples and positions. output: [samples, ..., classes]."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


# --- data -------------------------------------------------------------------------------------------------------------


def fashion_mnist(data_dir: Path) -> Data:
    """Returns the 60,000 and 10,000 images of <data_dir>/fashion-mnist, standardised."""
    dataset = load_dataset(IDX(directory="fashion-mnist", mean=0.286, std=0.353), data_dir)
    train, test = (part.batch_of(range(len(part))) for part in (dataset.train, dataset.test))
    return Data(*train, *test)


def scaled_digits(data_dir: Path) -> Data:
    """Returns scikit-learn's digits at 28x28: 1,437 for training, 360 for the test."""
    x, y = digits(28)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Data(x[train], y[train], x[test], y[test])


def tinyshakespeare(data_dir: Path, length: int = 64, tested: int = 512) -> Data:
    """Returns windows of characters, each with the next characters as its labels.

    The test part is the first `tested` windows of the last tenth of the text.
    """
    text = (data_dir / "tinyshakespeare" / "input.txt").read_text()
    table = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([table[character] for character in text])
    cut = int(0.9 * len(tokens))
    train, test = ((part[:-1], part[1:]) for part in (tokens[:cut], tokens[cut:]))
    windows = [_windows(part, length) for part in (*train, *test)]
    return Data(windows[0], windows[1], windows[2][:tested], windows[3][:tested])


def _windows(tokens: Tensor, length: int) -> Tensor:
    return tokens[: len(tokens) // length * length].view(-1, length)


def cifar10(data_dir: Path) -> Data:
    """Returns 50,000 images of the JPEG copy of CIFAR-10 and each tenth of its test part, standardised by channel.

    The test part is grouped by class. On all of its 10,000 images an evaluation takes as long as sixty steps.
    """
    import numpy as np
    from simplejpeg import decode_jpeg

    stored = np.load(data_dir / "cifar10" / "cifar10_jpeg75.npz")
    header, body, offsets = stored["header"].tobytes(), stored["body"].tobytes(), stored["offsets"].tolist()
    images = [decode_jpeg(header + body[begin:end]) for begin, end in pairwise(offsets)]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    x = (x - x[:50_000].mean((0, 2, 3), keepdim=True)) / x[:50_000].std((0, 2, 3), keepdim=True)
    y = torch.from_numpy(stored["labels"]).long()
    return Data(x[:50_000], y[:50_000], x[50_000::10], y[50_000::10])


# --- models -----------------------------------------------------------------------------------------------------------


def strided_cnn() -> nn.Module:
    """Returns two strided convolutions and two linear layers, 52 k parameters, for 28x28 in one channel: small enough
    for hundreds of runs on one core.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=4, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class GPT(nn.Module):
    """Two blocks of width 64 with four heads, learned positions, for 65 characters: 0.11 M parameters."""

    def __init__(self, tokens: int = 65, width: int = 64, length: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions
        for block in self.blocks:
            h = block(h)
        output: Tensor = self.head(self.norm(h))
        return output


class ViT(nn.Module):
    """Two blocks of width 64 with four heads on the 16 patches of a 28x28 image, and a mean over patches: 0.10 M."""

    def __init__(self, patch: int = 7, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros((28 // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads=4, is_causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT + self.positions
        for block in self.blocks:
            h = block(h)
        output: Tensor = self.head(self.norm(h).mean(1))
        return output


class LSTM(nn.Module):
    """Torch's own LSTM of width 128 between an embedding and a head, for 65 characters: 0.14 M parameters."""

    def __init__(self, tokens: int = 65, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.tokens(x))[0])
        return output


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int, is_causal: bool = True) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        n, t, width = h.shape
        q, k, v = self.qkv(self.norms[0](h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        h = h + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        output: Tensor = h + self.mlp(self.norms[1](h))
        return output


TASKS = {
    "fashion-mnist-4096": Task(
        "CNN, Fashion-MNIST, batch 4,096",
        fashion_mnist,
        strided_cnn,
        4096,
        "test accuracy",
        0.85,
        every=4,
        steps=Range(20, 200),
        seconds=30,
    ),
    "fashion-mnist-512": Task(
        "CNN, Fashion-MNIST, batch 512",
        fashion_mnist,
        strided_cnn,
        512,
        "test accuracy",
        0.85,
        every=10,
        steps=Range(50, 500),
        seconds=20,
    ),
    "digits-mlp": Task(
        "wide MLP, digits, batch 256",
        scaled_digits,
        mlp,
        256,
        "training loss",
        0.001,
        every=5,
        steps=Range(20, 300),
        seconds=20,
    ),
    "gpt": Task(
        "small GPT, tinyshakespeare, batch 64 x 64",
        tinyshakespeare,
        GPT,
        64,
        "test loss",
        2.0,
        every=20,
        steps=Range(100, 800),
        seconds=60,
        trials=8,
    ),
    "vit": Task(
        "small ViT, Fashion-MNIST, batch 256",
        fashion_mnist,
        ViT,
        256,
        "test accuracy",
        0.8,
        every=10,
        steps=Range(50, 500),
        seconds=60,
        trials=8,
    ),
    "lstm": Task(
        "LSTM, tinyshakespeare, batch 64 x 64",
        tinyshakespeare,
        LSTM,
        64,
        "test loss",
        2.0,
        every=20,
        steps=Range(100, 800),
        seconds=60,
        trials=8,
    ),
    "resnet20": Task(
        "ResNet-20, CIFAR-10 (JPEG q75 copy), batch 128",
        cifar10,
        partial(resnet20, channels=3),
        128,
        "test accuracy",
        0.4,
        every=20,
        steps=Range(40, 160),
        seconds=100,
        trials=6,
    ),
}

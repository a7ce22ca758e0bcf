"""The tasks: data, a model, its loss, and the target."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.data import (
    IGNORED,
    Data,
    cifar10,
    fashion_mnist,
    multi30k,
    penn_treebank,
    scaled_digits,
    tinyshakespeare,
)
from benchmarks.methods.networks import GPT, LSTM, Translator, ViT, narrow_resnet18, strided_cnn
from benchmarks.methods.search import Range
from benchmarks.models import mlp, resnet20

__all__ = ["COMPARED", "TASKS", "Data", "Task", "loss_of"]

EVALUATION_BATCH = 2500
PENN_WORDS = 2002  # WORDS, the others, and the end of a line


@dataclass(frozen=True, slots=True)
class Task:
    """One question: seconds and steps until the model's score reaches `target`.

    measure: accuracy or loss on the test part, or loss on the training part. every: steps between two evaluations, the
    resolution of every count. steps: the range of the lengths that schedules are drawn from. seconds: CPU time after
    which a run has missed the target.
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

    def is_reached(self, score: float) -> bool:
        """Returns whether the score is as good as the target."""
        return score >= self.target if self.measure == "test accuracy" else score <= self.target

    @torch.no_grad()
    def score(self, model: nn.Module, data: Data) -> float:
        """Returns the measure: a mean over all labels of its part that the loss reads."""
        x, y = (data.train_x, data.train_y) if self.measure == "training loss" else (data.test_x, data.test_y)
        model.eval()
        total = 0.0
        for inputs, labels in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True):
            output = model(inputs)
            if self.measure == "test accuracy":
                total += int((output.argmax(-1) == labels).sum())
            else:
                total += float(loss_of(output, labels)) * int((labels != IGNORED).sum())
        model.train()
        return total / int((y != IGNORED).sum())


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Returns the cross-entropy, a mean over samples and positions. output: [samples, ..., classes]."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), ignore_index=IGNORED)


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
        2.2,
        every=20,
        steps=Range(60, 600),
        seconds=30,
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
    ),
    "resnet18": Task(
        "narrow ResNet-18, CIFAR-10 (JPEG q75 copy), batch 128",
        cifar10,
        narrow_resnet18,
        128,
        "test accuracy",
        0.4,
        every=10,
        steps=Range(30, 240),
        seconds=45,
    ),
    "ptb-lstm": Task(
        "LSTM, Penn Treebank in 2,000 words, batch 32 x 32",
        penn_treebank,
        partial(LSTM, tokens=PENN_WORDS),
        32,
        "test loss",
        4.7,
        every=20,
        steps=Range(60, 500),
        seconds=40,
    ),
    "ptb-transformer": Task(
        "small transformer, Penn Treebank in 2,000 words, batch 32 x 32",
        penn_treebank,
        partial(GPT, tokens=PENN_WORDS, length=32),
        32,
        "test loss",
        4.8,
        every=20,
        steps=Range(60, 500),
        seconds=40,
    ),
    "multi30k": Task(
        "small encoder and decoder, Multi30k en-de in 2,000 words, batch 64",
        multi30k,
        Translator,
        64,
        "test loss",
        3.6,
        every=20,
        steps=Range(60, 500),
        seconds=40,
    ),
}

# In the order in which the comparison takes them: those whose runs are short come first.
COMPARED = (
    "fashion-mnist-4096",
    "fashion-mnist-512",
    "digits-mlp",
    "ptb-transformer",
    "ptb-lstm",
    "multi30k",
    "gpt",
    "resnet18",
)

"""The data of the tasks, in memory: inputs and labels of a training and a test part."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.models import digits
from ngd_workers.contract.spec import IDX, TextPairs, Tokens, WordTokenizer
from ngd_workers.data import Dataset, TokenPairs, load_dataset

__all__ = [
    "IGNORED",
    "LENGTH",
    "WORDS",
    "Data",
    "cifar10",
    "fashion_mnist",
    "multi30k",
    "penn_treebank",
    "scaled_digits",
    "tinyshakespeare",
]

WORDS = 2000  # the most frequent of a text; all others are one
LENGTH = 16  # words of a sentence of `multi30k`, whose others are cut off
IGNORED = -100  # the label of a position that the loss doesn't read


@dataclass(frozen=True, slots=True)
class Data:
    """Inputs [samples, ...] and labels [samples] or, of a sequence, [samples, positions]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


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


def penn_treebank(data_dir: Path, length: int = 32, tested: int = 512) -> Data:
    """Returns windows of words of the Penn Treebank, each with the next words as its labels.

    The test part is the first `tested` windows of the validation text.
    """
    text = Tokens(
        train="ptb/ptb.train.txt.gz",
        test="ptb/ptb.valid.txt.gz",
        length=length,
        tokenizer=WordTokenizer(max_words=WORDS),
    )
    train, test = _parts(load_dataset(text, data_dir), tested)
    return Data(*train, *test)


def multi30k(data_dir: Path) -> Data:
    """Returns English sentences, each followed by the German one up to its last word, and the German words to come."""
    pairs = TextPairs(
        directory="multi30k",
        test="val",
        source="en",
        target="de",
        tokenizer=WordTokenizer(max_words=WORDS),
        target_tokenizer=WordTokenizer(max_words=WORDS),
        max_length=LENGTH,
        longer="cut",
    )
    dataset = load_dataset(pairs, data_dir)
    assert isinstance(dataset.shape, TokenPairs)
    parts = list[Tensor]()
    for source, target in _parts(dataset):
        source, target = (_widened(x, LENGTH + 2, dataset.shape.padding) for x in (source, target))
        labels = target[:, 1:]
        parts += [torch.cat([source, target[:, :-1]], 1), labels.masked_fill(labels == dataset.shape.padding, IGNORED)]
    return Data(*parts)


def _parts(dataset: Dataset, tested: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Returns inputs and labels of the training part, and of the first `tested` samples of the test part."""
    parts = []
    for part, count in ((dataset.train, len(dataset.train)), (dataset.test, tested or len(dataset.test))):
        x, y = (dataset.collate or default_collate)([part[index] for index in range(count)])[:2]
        parts.append((x, y))
    return parts


def _widened(x: Tensor, width: int, padding: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=padding)

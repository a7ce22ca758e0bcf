"""Texts of many lengths: a step does not depend on how a global batch is divided over micro-batches and ranks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import LNGD, Empirical, Eva, Exact, Settings
from tests.support.methods import LOCAL, METHODS
from tests.support.ranks import run_ranks
from tests.support.tensors import F64, captured, flat

FISHERS: dict[str, Settings] = {
    "empirical of means": Empirical(positions="mean"),
    "empirical of sums": Empirical(),
    "exact of means": Exact(),
    "exact of sums": Exact(positions="sum"),
}
CASES = [
    (method, fisher)
    for method, choice in METHODS.items()
    for fisher in FISHERS
    if "empirical" in fisher or not isinstance(choice, LNGD | Eva)
]
TOKENS, CLASSES, PADDING = 6, 4, -100
SOURCES, TARGETS = (7, 2, 5, 1, 3, 7, 4, 2), (5, 1, 2, 4, 3, 1, 5, 2)


class Translator(nn.Module):
    """The mean of a source's features, with its padding left out, is added to those of each token of the target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh())
        self.tokens, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, CLASSES)
        self.double()

    def forward(self, source: Tensor, is_read: Tensor, target: Tensor) -> Tensor:
        features = self.source(source) * is_read.unsqueeze(-1)
        pooled = features.sum(1) / is_read.sum(1, keepdim=True)
        logits: Tensor = self.head(torch.tanh(self.tokens(target) + pooled.unsqueeze(1)))
        return logits


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns sources, where they are read, targets, and labels, which are PADDING beyond the target's end."""
    generator = torch.Generator().manual_seed(step)
    source = torch.randn(8, 7, 3, dtype=F64, generator=generator)
    is_read = torch.arange(7) < torch.tensor(SOURCES).unsqueeze(1)
    target, label = (torch.randint(n, (8, 5), generator=generator) for n in (TOKENS, CLASSES))
    return source, is_read, target, label.masked_fill(torch.arange(5) >= torch.tensor(TARGETS).unsqueeze(1), PADDING)


def train(optimizer: NGD, model: nn.Module, rank: int, world_size: int, micro_batches: int) -> Tensor:
    for step in range(2):
        source, is_read, target, label = batch(step)
        total = int((label != PADDING).sum())
        optimizer.zero_grad()
        for part in torch.arange(8).chunk(world_size)[rank].chunk(micro_batches):
            # Short rows, as a loader gives them: micro-batches differ in length too.
            longest, last = int(is_read[part].sum(1).max()), int((label[part] != PADDING).sum(1).max())
            output = model(source[part, :longest], is_read[part, :longest], target[part, :last])
            labels = label[part, :last]
            optimizer.fisher_backward(output, ignored=labels == PADDING)
            loss = F.cross_entropy(output.flatten(0, 1), labels.flatten(), ignore_index=PADDING, reduction="sum")
            (loss * world_size / total).backward()
        optimizer.step()
    return flat(model)


def config(case: tuple[str, str], micro_batches: int, **settings: Any) -> NGDConfig:
    method, fisher = (choices[name] for choices, name in zip((METHODS, FISHERS), case, strict=True))
    return NGDConfig(
        lr=0.1, damping=1e-2, preconditioner=method, fisher=fisher, micro_batches=micro_batches, **settings
    )


def divided(rank: int, world_size: int, micro_batches: int) -> list[Tensor]:
    found = []
    for case in CASES:
        model = Translator()
        found.append(train(NGD(model, config(case, micro_batches)), model, rank, world_size, micro_batches))
    return found


@pytest.fixture(scope="module")
def whole() -> list[Tensor]:
    return divided(0, 1, 1)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_of_other_lengths_take_the_step_of_the_whole(whole: list[Tensor], micro_batches: int) -> None:
    for case, found, expected in zip(CASES, divided(0, 1, micro_batches), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda m, case=case: f"{case}: {m}")


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 1), (2, 2)])
def test_ranks_with_texts_of_other_lengths_take_the_step_of_the_whole(
    whole: list[Tensor], ranks: int, micro_batches: int
) -> None:
    for per_rank in run_ranks(ranks, divided, micro_batches):
        for case, found, expected in zip(CASES, per_rank, whole, strict=True):
            if case[0] in LOCAL:  # each rank has a cache of its own samples
                continue
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda m, case=case: f"{case}: {m}")


@pytest.mark.parametrize("fisher", FISHERS)
def test_padding_of_sources_alone_counts_for_nothing_where_it_is_told_of(fisher: str) -> None:
    """The output has one prediction a sample: none shows that the sources are padded."""
    source, is_read, _, label = batch(0)
    found = []
    for width in (7, 12):
        model = Translator()
        optimizer = NGD(model, config(("kfac", fisher), 1))
        more = width - 7
        output = model(F.pad(source, (0, 0, 0, more), value=9.0), F.pad(is_read, (0, more)), torch.zeros(8, 1).long())
        optimizer.fisher_backward(output, ignored=torch.zeros(8, 1, dtype=torch.bool))
        F.cross_entropy(output.squeeze(1), label[:, 0]).backward()
        found.append(captured(optimizer))

    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_the_exact_fisher_is_the_same_where_nothing_is_ignored() -> None:
    """A column of the exact Fisher reaches the rows of one position: those of the others count all the same."""
    x = torch.randn(4, 3, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = []
    for ignored in (None, torch.zeros(4, 3, dtype=torch.bool)):
        torch.manual_seed(0)
        model = nn.Linear(6, 5).double()
        optimizer = NGD(model, NGDConfig(fisher=Exact()))
        output = model(x)
        optimizer.fisher_backward(output, ignored=ignored)
        output.logsumexp(-1).mean().backward()
        found.append(captured(optimizer))

    assert found[0].keys() == {".A", ".G"}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=0)

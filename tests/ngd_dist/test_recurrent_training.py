"""A small recurrent net on text: every method trains it, on one rank and on two, and after a restart."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.extending.method import Diagonal
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import RECIPES, OwnerSharded
from ngd_dist.model_card import card_of
from tests.support.methods import LOCAL, SHIPPED
from tests.support.ranks import run_ranks
from tests.support.tensors import weights

TEXT = "the quick brown fox jumps over the lazy dog and the lazy dog sleeps on while the quick brown fox runs away "
WORDS = sorted(set(TEXT))
METHODS = [*SHIPPED, Diagonal().kind]
LENGTH, BATCH, STEPS, SAVED_AT = 8, 16, 5, 3


class Net(nn.Module):
    """An embedding, a GRU from both ends, an LSTM of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(len(WORDS), 8)
        self.both = nn.GRU(8, 3, bidirectional=True, batch_first=True)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, len(WORDS))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.both(self.tokens(x))[0])[0])
        return output


class Reader(nn.Module):
    """An LSTM that reads text letter by letter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.lstm = nn.Embedding(len(WORDS), 16), nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, len(WORDS))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.tokens(x))[0])
        return output


def batch_of(step: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Returns letters [N, T], and the letters that follow them."""
    letters = torch.tensor([WORDS.index(letter) for letter in TEXT])
    starts = torch.randint(len(TEXT) - length, (BATCH,), generator=torch.Generator().manual_seed(step))
    windows = torch.stack([letters[start : start + length + 1] for start in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


def train(model: nn.Module, optimizer: NGD, steps: range, rank: int = 0, world_size: int = 1) -> list[float]:
    losses = []
    for step in steps:
        x, y = (whole.chunk(world_size)[rank] for whole in batch_of(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def config(method: str, world_size: int = 1) -> NGDConfig:
    settings: dict[str, Any] = {"preconditioner": {"kind": method}, "lr": 0.02, "damping": 0.03}
    if world_size > 1:
        settings["strategy"] = OwnerSharded(replicate_below=0)
    return NGDConfig.model_validate(settings)


def trained(rank: int, world_size: int, method: str) -> list[Tensor]:
    model = Net().double()
    train(model, NGD(model, config(method, world_size)), range(STEPS), rank, world_size)
    return weights(model)


def trained_by_each(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    return {method: trained(rank, world_size, method) for method in METHODS if method not in LOCAL}


@pytest.mark.ranks
def test_two_ranks_have_the_weights_of_one() -> None:
    of_ranks = run_ranks(2, trained_by_each)

    for method in of_ranks[0]:
        single = trained(0, 1, method)
        assert max((w - w0).abs().max() for w, w0 in zip(single, weights(Net().double()), strict=True)) > 1e-3
        for of_rank in of_ranks:
            for ours, theirs in zip(of_rank[method], single, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_run_goes_on_bit_for_bit(method: str) -> None:
    model = Net().double()
    optimizer = NGD(model, config(method))
    train(model, optimizer, range(SAVED_AT))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(SAVED_AT, STEPS))
    again = Net().double()
    resumed = NGD(again, config(method))
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, range(SAVED_AT, STEPS))

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(again), weights(model), strict=True))


def test_an_lstm_learns_a_text_in_fewer_steps_than_by_adamw() -> None:
    """The recipe as it stands, and AdamW at each of three lr."""
    model = Reader()
    optimizer = NGD(model, RECIPES["lstm"])

    ours = steps_to_learn(model, optimizer)

    assert {layer.name for layer in optimizer.layers} == {"tokens", "lstm.l0", "head"}
    assert optimizer.plain_parameters == {}
    assert ours < 20
    for lr in (0.003, 0.01, 0.03):
        model = Reader()
        assert steps_to_learn(model, torch.optim.AdamW(model.parameters(), lr=lr)) > ours


def steps_to_learn(model: nn.Module, optimizer: torch.optim.Optimizer, most: int = 40) -> int:
    """Returns the first step with a loss below 0.5; it is 3.3 at first."""
    for step in range(most):
        x, y = batch_of(step, 16)
        optimizer.zero_grad()
        output = model(x)
        if isinstance(optimizer, NGD):
            optimizer.fisher_backward(output)
        loss = F.cross_entropy(output.flatten(0, 1), y.flatten())
        if float(loss.detach()) < 0.5:
            return step
        loss.backward()
        optimizer.step()
    return most


def test_the_card_of_a_model_counts_the_steps_of_each_layer() -> None:
    card = card_of(Net(), [torch.zeros(2, LENGTH, dtype=torch.int64)])

    positions = {layer.name: layer.positions for layer in card.layers}

    assert set(positions.values()) == {LENGTH}
    assert len(positions) == 2 + 4 + 2

"""The settings of each family train a model of that family, as they stand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD
from ngd_dist.config import RECIPES, Family


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm, self.head = nn.Embedding(8, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.tokens(x))[0])
        return output


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "cnn":
        return nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8))
    if family == "lstm":
        return Recurrent()
    if family == "gpt":
        return nn.Sequential(nn.Embedding(8, 6), nn.LayerNorm(6), nn.Linear(6, 8))
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 8))


@pytest.mark.parametrize("family", RECIPES)
def test_a_recipe_lowers_the_loss_of_a_model_of_its_family(family: Family) -> None:
    model = model_of(family)
    optimizer = NGD(model, RECIPES[family])
    y = torch.arange(64) % 8
    x = y.view(16, 4) if family in ("gpt", "lstm") else F.one_hot(y, 8).float()

    def objective() -> tuple[Tensor, Tensor]:
        output = model(x)
        return F.cross_entropy(output.flatten(0, -2), y), output

    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, output = objective()
        if optimizer.config.fisher.kind != "empirical":
            optimizer.fisher_backward(output)
        loss.backward()
        optimizer.step(objective=objective if optimizer.config.needs_objective else None)
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.7 * losses[0]

"""`NGD.explain`: what a user reads before paying for it."""

import pytest
import torch
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import LNGD, AllReduce, OwnerSharded
from tests.support.ranks import run_ranks


class Odd(nn.Module):
    """One layer of each sort, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 30)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))
        return self.scale * logits


def line(table: str, name: str) -> list[str]:
    return next(row.split() for row in table.splitlines() if row.split()[:1] == [name])


def test_each_layer_has_its_sizes_costs_and_memory() -> None:
    table = NGD(Odd(), NGDConfig(max_dense=20)).explain()

    # Two groups of 3 outputs and 2 * 9 + 1 inputs; 2 (19^3 + 3^3) operations each; and in float32 twice the matrices
    # (statistic, inverse) and once the triangles (the value before): 4 (2 * 2 * (361 + 9) + 2 * (190 + 6)) bytes.
    conv = line(table, "conv")
    assert conv[1:3] == ["Conv2d,", "KFAC"]
    assert conv[3:8] == ["2x3x19", "A", "2x19x19,", "G", "2x3x3"]
    assert "27.5 K" in " ".join(conv)
    assert "7.31 KiB" in " ".join(conv)
    assert line(table, "norm")[1:5] == ["BatchNorm2d,", "UnitWise", "6x2", "F"]
    assert line(table, "head")[3:8] == ["30x7", "A", "7x7,", "G", "30"]
    assert "  scale  a parameter of Odd itself, outside its layers" in table.splitlines()
    assert "left to the fallback, adamw at lr 0.01:" in table


def test_a_method_that_reads_activations_says_which_it_found() -> None:
    model = Odd()
    optimizer = NGD(model, NGDConfig(preconditioner=LNGD()))
    assert "read by" not in optimizer.explain()

    model(torch.randn(2, 4, 5, 5))

    table = optimizer.explain()
    assert "LNGD, read by ReLU" in " ".join(line(table, "conv"))
    assert "LNGD, read by None" in " ".join(line(table, "head"))


def explained(rank: int, world_size: int) -> dict[str, str]:
    strategies = {"all": AllReduce(), "owner": OwnerSharded(replicate_below=500)}
    return {name: NGD(Odd(), NGDConfig(strategy=strategy)).explain() for name, strategy in strategies.items()}


@pytest.mark.ranks
def test_owners_and_who_averages_are_told_alike_on_every_rank() -> None:
    first, second = run_ranks(2, explained)

    assert first == second
    assert "owner_sharded on 2 ranks; gradients are averaged by the optimizer" in first["owner"]
    owners = {name: line(first["owner"], name) for name in ("conv", "norm", "head")}
    assert {"0", "1"} == {cell for row in owners.values() for cell in row if cell in ("0", "1")}
    assert "all" in line(first["all"], "conv")

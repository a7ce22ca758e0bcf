"""Layers that are alike are handled by one call; the result is that of one call for each."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig, covered
from ngd_dist.capture import estimates
from ngd_dist.config import (
    EKFAC,
    KFAC,
    LNGD,
    SINGD,
    TKFAC,
    AdaptiveInterval,
    Eva,
    FixedInterval,
    PreconditionerConfig,
)
from ngd_dist.layers import LayerBatch
from ngd_dist.statistics.statistic import Key


class Model(nn.Module):
    """Pairs of layers that are alike: convolutions in groups and without, linear layers with bias and without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, groups=g) for g in (1, 1, 2, 2))
        self.linears = nn.ModuleList(nn.Linear(4, 4, bias=b) for b in (True, True, False, False, True))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = torch.tanh(convolution(x))
        x = x.mean((-2, -1))
        for linear in self.linears:
            x = torch.tanh(linear(x))
        return x


def weights_after(steps: int, preconditioner: PreconditionerConfig) -> tuple[NGD, list[Tensor]]:
    model = Model().double()
    groups = [
        {"params": [*model.convolutions.parameters(), *model.linears[:2].parameters()]},
        {"params": [*model.linears[2:].parameters(), *model.unused.parameters()], "damping": 0.3, "lr": 0.02},
    ]
    config = NGDConfig(lr=0.05, damping=0.1, preconditioner=preconditioner, staleness=FixedInterval(steps=3))
    optimizer = NGD(model, config, param_groups=groups)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 4, 5, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(4, (8,), generator=generator)).backward()
        optimizer.step()
    return optimizer, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "preconditioner",
    [
        KFAC(),
        KFAC(damping_form="exact"),
        KFAC(rows=2),
        LNGD(),
        EKFAC(),
        TKFAC(),
        Eva(),
        SINGD(),
        SINGD(structure="low_rank", width=2),
        SINGD(structure="block_diagonal", width=2),
    ],
    ids=lambda c: repr(c)[:60],
)
def test_stacked_layers_move_as_each_alone(
    preconditioner: PreconditionerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, stacked = weights_after(7, preconditioner)
    monkeypatch.setattr(covered, "MAX_STACKED", 0)
    _, alone = weights_after(7, preconditioner)

    sizes = sorted(len(stack.layers) for stack in optimizer._curvature.stacks)
    assert sizes == ([2, 2, 2, 4] if not isinstance(preconditioner, LNGD | EKFAC) else [1] * 10)
    torch.testing.assert_close(stacked, alone, rtol=1e-9, atol=1e-11)


def test_an_inversion_that_fails_leaves_the_others_of_its_stack_alone() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval(), max_failed_inversions=None))
    statistic = optimizer._curvature.statistics[Key("1", "A")]
    fold = statistic.fold
    statistic.fold = lambda new: fold(-1e9 * new)  # type: ignore[method-assign]

    F.cross_entropy(model(torch.randn(8, 3)), torch.randint(3, (8,))).backward()
    optimizer.step()

    endings = {refresh.statistic: refresh.ending for refresh in optimizer.stats.refreshes}
    assert endings["1.A"] == "NOT_POSITIVE_DEFINITE"
    assert {ending for name, ending in endings.items() if not name.startswith("1.")} == {"OK"}
    assert [optimizer._curvature.caches.has(name) for name in "012"] == [True, False, True]


@pytest.mark.parametrize("staleness", [FixedInterval(), AdaptiveInterval()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("rows", [None, 4])
def test_stacked_micro_batches_give_each_layer_its_own_statistics(
    staleness: FixedInterval | AdaptiveInterval, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken() -> tuple[dict[Key, Tensor], Tensor]:
        torch.manual_seed(0)
        linears = [nn.Linear(8, 8, bias=b) for b in (True, True, False, True, False)]
        model = nn.Sequential(*(m for linear in linears for m in (linear, nn.Tanh()))).double()
        config = NGDConfig(staleness=staleness, preconditioner=KFAC(rows=rows), micro_batches=2)
        optimizer = NGD(model, config)
        for part in torch.randn(2, 10, 3, 8, dtype=torch.float64):
            (F.cross_entropy(model(part).flatten(0, 1), torch.zeros(30, dtype=torch.long)) / 2).backward()
        capture = optimizer._capture
        return capture.take(), capture.estimates.counts(optimizer._due, [], torch.device("cpu"))

    stacked = taken()
    monkeypatch.setattr(estimates, "MAX_STACKED_ROWS", 0)
    alone = taken()

    assert len(stacked[0]) == 10
    torch.testing.assert_close(stacked, alone, rtol=1e-12, atol=1e-14)


def test_the_wait_for_layers_that_are_alike_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(estimates.StackedBatch):
        def __init__(self, batches: Sequence[LayerBatch]) -> None:
            made.append(len(batches))
            super().__init__(batches)

    monkeypatch.setattr(estimates, "MAX_WAITING", 3 * 8 * 7)  # rows of 3 + 1 and 3 numbers
    monkeypatch.setattr(estimates, "StackedBatch", Counted)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(10)))
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval()))

    F.cross_entropy(model(torch.randn(8, 3)), torch.randint(3, (8,))).backward()
    optimizer.step()

    assert made == [4, 4, 2]

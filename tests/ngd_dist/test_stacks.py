"""Layers that are alike are handled by one call; the result is that of one call for each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig, covered
from ngd_dist.config import EKFAC, KFAC, LNGD, FixedInterval, PreconditionerConfig
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
    "preconditioner", [KFAC(), KFAC(damping_form="exact"), KFAC(rows=2), LNGD(), EKFAC()], ids=lambda c: repr(c)[:30]
)
def test_stacked_layers_move_as_each_alone(
    preconditioner: PreconditionerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, stacked = weights_after(7, preconditioner)
    monkeypatch.setattr(covered, "MAX_STACKED", 0)
    _, alone = weights_after(7, preconditioner)

    sizes = sorted(len(stack.layers) for stack in optimizer._curvature.stacks)
    assert sizes == ([2, 2, 2, 4] if isinstance(preconditioner, KFAC) else [1] * 10)
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

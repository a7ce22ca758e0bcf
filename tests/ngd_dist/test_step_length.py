"""Each layer's own factor is the minimiser of its quadratic model, from per-sample gradients that are never formed."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC, LNGD, FixedInterval, GivenLength, KLClip, LayerWise, NormClip
from tests.reference.lngd import quadratic_model
from tests.support.ranks import run_ranks
from tests.support.tensors import F64

MU = 1e-8
CONFIG = NGDConfig(lr=0.3, momentum=0.0, step_length=LayerWise(mu=MU), staleness=FixedInterval())


def changed(config: NGDConfig, **changes: Any) -> NGDConfig:
    return NGDConfig.model_validate(config.model_dump() | changes)


class Windows(nn.Module):
    """Cuts each sample into windows and folds them into the batch dimension, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out


class Twice(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.tanh(self.layer(x)))
        return out


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(3, 2), (5, 3)),
    "wide linear": (nn.Linear(3, 7, bias=False), (5, 3)),
    "linear at positions": (nn.Linear(3, 2), (5, 4, 2, 3)),
    "convolution": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (5, 2, 6, 6)),
    "grouped convolution": (nn.Conv1d(4, 6, 3, groups=2), (5, 4, 6)),
    "batch norm": (nn.BatchNorm2d(3).eval(), (5, 3, 2, 2)),
    "layer norm": (nn.LayerNorm(3), (5, 4, 3)),
    "windows": (Windows(), (5, 4, 2, 3)),
    "twice": (Twice(), (5, 3)),
}


def sample_losses(out: Tensor) -> Tensor:
    """Returns a loss of each sample, [N], with gradients that differ from sample to sample."""
    flat = out.flatten(1)
    return (flat * torch.linspace(0.5, 2, flat.shape[1], dtype=flat.dtype)).sin().sum(1)


def gradients_of(model: nn.Module, parameters: list[nn.Parameter], losses: Callable[[int], Tensor], n: int) -> Tensor:
    """Returns the gradients of each sample's own loss, flattened: [N, numbers]."""
    rows = [torch.autograd.grad(losses(i), parameters) for i in range(n)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("case", CASES)
def test_a_direction_meets_the_gradient_of_each_sample(case: str) -> None:
    torch.manual_seed(0)
    module, shape = CASES[case]
    model, x = copy.deepcopy(module).double(), torch.randn(shape, dtype=F64)
    optimizer = NGD(model, CONFIG)
    (layer,) = optimizer.layers
    direction_BOI = torch.randn(layer.shape.gradient, dtype=F64)

    sample_losses(model(x)).mean().backward()

    (rows,) = optimizer._capture.layer_batches(layer.name)
    flat = torch.cat([part.flatten() for part in layer.split(direction_BOI)])
    exact = gradients_of(model, layer.parameters, lambda i: sample_losses(model(x[i : i + 1])).sum(), len(x)) @ flat
    torch.testing.assert_close(rows.along(direction_BOI), exact, rtol=1e-12, atol=1e-13)


def test_samples_are_told_apart_where_a_sequence_comes_first() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 5, 3, dtype=F64)
    optimizer = NGD(model, changed(CONFIG, batch_dim=1))
    direction_BOI = torch.randn(1, 2, 4, dtype=F64)

    sample_losses(model(x).mT.movedim(-1, 0)).mean().backward()

    (rows,) = optimizer._capture.layer_batches("")
    flat = torch.cat([direction_BOI[0, :, :3].flatten(), direction_BOI[0, :, 3]])
    parameters = list(model.parameters())
    exact = gradients_of(model, parameters, lambda i: sample_losses(model(x).mT.movedim(-1, 0))[i], 5) @ flat
    torch.testing.assert_close(rows.along(direction_BOI), exact, rtol=1e-12, atol=1e-13)


def build() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Returns a model with layers of several kinds, and 12 samples with labels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).double()
    model[1].eval()  # batch statistics would couple the samples
    return model, torch.randn(12, 1, 4, 4, dtype=F64), torch.randint(4, (12,))


def step(model: nn.Module, config: NGDConfig, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Returns by how much each layer's parameters moved in one step, flattened, divided by -lr."""
    optimizer = NGD(model, config)
    before = [p.detach().clone() for p in model.parameters()]
    parts = config.micro_batches
    for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
        loss = F.cross_entropy(model(part), target, reduction=config.loss_reduction)
        (loss / parts if config.loss_reduction == "mean" else loss).backward()
    optimizer.step()
    moved = {p: (was - p).detach().flatten() / config.lr for p, was in zip(model.parameters(), before, strict=True)}
    return {layer.name: torch.cat([moved[p] for p in layer.parameters]) for layer in optimizer.layers}


def quadratics(directions: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields d^T grad and d^T F d of each layer of `build`, F the mean over samples of their gradients' squares."""
    model, x, y = build()
    for name, direction in directions.items():
        parameters = list(model.get_submodule(name).parameters())
        losses = F.cross_entropy(model(x), y, reduction="none")
        along = (
            torch.stack(
                [
                    torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                    for loss in losses
                ]
            )
            @ direction
        )
        yield along.mean(), along.square().mean()


@pytest.mark.parametrize("method", [KFAC(), LNGD()], ids=lambda method: method.kind)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_each_layer_goes_to_the_minimum_of_its_quadratic_model(method: KFAC | LNGD, micro_batches: int) -> None:
    config = changed(CONFIG, preconditioner=method, micro_batches=micro_batches)
    directions = step(*with_config(changed(config, step_length=GivenLength())))

    moved = step(*with_config(config))

    for (name, direction), (inner, curvature) in zip(directions.items(), quadratics(directions), strict=True):
        torch.testing.assert_close(moved[name], direction * inner / (curvature + MU), rtol=1e-10, atol=1e-14)


def with_config(config: NGDConfig) -> tuple[nn.Module, NGDConfig, Tensor, Tensor]:
    model, x, y = build()
    return model, config, x, y


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_summed_loss_takes_the_step_of_its_mean(micro_batches: int) -> None:
    config = changed(CONFIG, step_length=LayerWise(mu=1e-300))  # it has the units of the curvature
    mean = step(*with_config(config))

    summed = step(*with_config(changed(config, loss_reduction="sum", micro_batches=micro_batches)))

    for name, moved in mean.items():
        torch.testing.assert_close(summed[name], moved, rtol=1e-10, atol=1e-14)


def test_own_factors_lower_the_quadratic_model_at_least_as_far_as_a_global_one() -> None:
    directions = step(*with_config(changed(CONFIG, step_length=GivenLength())))

    moved = step(*with_config(CONFIG))

    inner, curvature = (torch.stack(values) for values in zip(*quadratics(directions), strict=True))
    own = torch.stack([(moved[name] @ d) / (d @ d) for name, d in directions.items()])
    shared = (inner.sum() / curvature.sum()).expand(len(own))
    assert quadratic_model(own, inner, curvature) < quadratic_model(shared, inner, curvature) < 0
    # By Cauchy and Schwarz: no layer is predicted to lower the loss by more than lr.
    assert bool((own * inner <= 1).all())


@pytest.mark.parametrize("clip", [KLClip(max_kl=1e-4), NormClip(max_norm=1e-2)], ids=lambda clip: clip.kind)
def test_clipping_bounds_what_the_factors_made(clip: KLClip | NormClip) -> None:
    free = step(*with_config(CONFIG))

    clipped = step(*with_config(changed(CONFIG, clip=clip)))

    whole = torch.cat(list(free.values()))
    factor = float(torch.cat(list(clipped.values())) @ whole / (whole @ whole))
    assert factor < 1
    for name, moved in free.items():
        torch.testing.assert_close(clipped[name], factor * moved, rtol=1e-10, atol=1e-14)
    if isinstance(clip, NormClip):
        assert factor * float(whole.norm()) == pytest.approx(clip.max_norm)
    else:
        # With its own factor a layer's d^T grad is its d^T F d: twice the KL divergence, but for mu.
        bound = sum(curvature for _, curvature in quadratics(clipped))
        assert CONFIG.lr**2 * float(bound) == pytest.approx(clip.max_kl, rel=1e-3)


def test_a_layer_whose_weights_are_used_past_its_module_takes_the_plain_step() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2).double(), torch.randn(6, 3, dtype=F64)
    model = nn.ModuleDict({"layer": layer})
    optimizer = NGD(model, CONFIG)
    before = layer.weight.detach().clone()

    F.linear(x, layer.weight, layer.bias).square().sum(1).mean().backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()

    torch.testing.assert_close(before - layer.weight.detach(), CONFIG.lr * gradient)


def test_a_scaled_loss_takes_the_same_step() -> None:
    plain = step(*with_config(CONFIG))
    model, x, y = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = NGD(model, CONFIG, grad_scaler=scaler)
    before = model[0].weight.detach().clone()

    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)

    moved = (before - model[0].weight.detach()).flatten() / CONFIG.lr
    torch.testing.assert_close(moved, plain["0"], rtol=1e-10, atol=1e-14)


def test_rows_that_wait_for_the_step_hold_no_patches() -> None:
    model, x, y = build()
    optimizer = NGD(model, CONFIG)

    F.cross_entropy(model(x), y).backward()

    (rows,) = optimizer._capture.layer_batches("0")
    rows.along(torch.ones(1, 3, 9, dtype=F64))
    assert not {"a_BNPI", "g_BNPO"} & vars(rows).keys()


def test_layers_in_two_precisions_go_their_own_lengths() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model[0].float()
    # All directions travel in the wider precision.
    optimizer = NGD(model, changed(CONFIG, strategy={"kind": "owner_sharded"}))
    before = [p.detach().clone() for p in model.parameters()]

    model[2](model[0](torch.randn(5, 3)).double()).square().sum(1).mean().backward()
    optimizer.step()

    assert not any(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


class Places(nn.Module):
    """Adds to all samples the same embedding of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.out = nn.Embedding(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x + self.places(torch.arange(4).unsqueeze(0))).mean(1)
        return out


def test_a_summed_loss_takes_the_step_of_its_mean_where_samples_share_a_run() -> None:
    torch.manual_seed(0)
    model, x, y = Places().double(), torch.randn(6, 4, 3, dtype=F64), torch.randint(4, (6,))
    config = changed(CONFIG, step_length=LayerWise(mu=1e-300))

    mean = step(copy.deepcopy(model), config, x, y)
    summed = step(model, changed(config, loss_reduction="sum"), x, y)

    assert mean.keys() == {"places", "out"}
    for name, moved in mean.items():
        torch.testing.assert_close(summed[name], moved, rtol=1e-10, atol=1e-14)


STRATEGIES: dict[str, Any] = {
    "all_reduce": {"kind": "all_reduce"},
    "owner_sharded": {"kind": "owner_sharded", "replicate_below": 0},
    "all hold": {"kind": "owner_sharded", "replicate_below": 0, "fraction": 1.0},
    "some replicated": {"kind": "owner_sharded", "replicate_below": 300},
}
RANK_CASES: dict[str, dict[str, Any]] = {
    "kfac": {"preconditioner": {"kind": "kfac"}},
    "lngd": {"preconditioner": {"kind": "lngd"}},
    "lngd micro-batches": {"preconditioner": {"kind": "lngd"}, "micro_batches": 3},
    "lngd summed": {"preconditioner": {"kind": "lngd"}, "loss_reduction": "sum"},
    "lngd kl": {"preconditioner": {"kind": "lngd"}, "clip": {"kind": "kl", "max_kl": 1e-4}},
    "lngd norm": {"preconditioner": {"kind": "lngd"}, "clip": {"kind": "norm", "max_norm": 1e-2}},
}


def trained(config: NGDConfig, rank: int, world_size: int) -> list[Tensor]:
    """Returns the weights after three steps on this rank's part of the batches."""
    model, x, y = build()
    optimizer = NGD(model, config)
    parts = config.micro_batches
    for _ in range(3):
        optimizer.zero_grad()
        own = zip(x.chunk(world_size)[rank].chunk(parts), y.chunk(world_size)[rank].chunk(parts), strict=True)
        for part, target in own:
            loss = F.cross_entropy(model(part), target, reduction=config.loss_reduction)
            (loss / parts if config.loss_reduction == "mean" else loss).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def train_all(rank: int, world_size: int) -> dict[tuple[str, str], list[Tensor]]:
    return {
        (case, strategy): trained(changed(CONFIG, strategy=STRATEGIES[strategy], **settings), rank, world_size)
        for case, settings in RANK_CASES.items()
        for strategy in STRATEGIES
    }


@pytest.fixture(scope="module")
def pair() -> list[dict[tuple[str, str], list[Tensor]]]:
    return run_ranks(2, train_all)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", RANK_CASES)
def test_two_ranks_take_the_steps_of_one_process(pair: list[Any], case: str, strategy: str) -> None:
    alone = trained(changed(CONFIG, **RANK_CASES[case]), 0, 1)

    for ours, theirs, expected in zip(pair[0][case, strategy], pair[1][case, strategy], alone, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)

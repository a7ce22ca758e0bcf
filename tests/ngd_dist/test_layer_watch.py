"""What `watch` tells of each layer, against dense float64 references from the formulas alone."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig, Preconditioner
from ngd_dist.config import EKFAC, KFAC, KLClip, LayerWise, NormClip
from ngd_dist.step.layer_watch import LONGEST, is_watched
from ngd_dist.telemetry import LayerStats
from tests.support.ranks import run_ranks
from tests.support.tensors import F64

N, LR, DAMPING = 24, 0.3, 0.05
EXACT = KFAC(damping_form="exact")
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run make gpu on a machine with one"),
    ],
)


def net(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 5, dtype=F64, generator=generator).to(dtype), torch.randint(3, (N,), generator=generator)


def step(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def whole(layer: nn.Module, of: str) -> Tensor:
    """Returns weight and bias of a linear layer, or their gradients, side by side: [O, I + 1]."""
    parts = [p if of == "value" else p.grad for p in (layer.weight, layer.bias)]
    return torch.cat([parts[0].detach(), parts[1].detach().unsqueeze(1)], 1).clone()


def dense_blocks(model: nn.Sequential, x: Tensor, y: Tensor) -> list[Tensor]:
    """Returns F = G (x) A of both layers, each sample by itself: A = mean a a^T, G = mean g g^T."""
    blocks = []
    for index in (0, 2):
        A, G = 0, 0
        for n in range(N):
            inputs = model[:index](x[n : n + 1]).detach()
            outputs = model[index](inputs).detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model[index + 1 :](outputs), y[n : n + 1]), outputs)
            a = torch.cat([inputs[0], inputs.new_ones(1)])
            A, G = A + torch.outer(a, a) / N, G + torch.outer(g[0], g[0]) / N
        blocks.append(torch.kron(G, A))
    return blocks


@pytest.mark.parametrize("clip", [None, KLClip(max_kl=1e-4), NormClip(max_norm=0.01)], ids=["none", "kl", "norm"])
@pytest.mark.parametrize("damping_form", ["exact", "pi"])
def test_norms_cosine_kl_and_factor_are_those_of_the_step_that_was_taken(clip: Any, damping_form: str) -> None:
    model, (x, y) = net(), batch()
    method = KFAC(damping_form=damping_form)
    optimizer = NGD(model, NGDConfig(lr=LR, momentum=0.0, damping=DAMPING, preconditioner=method, clip=clip))
    optimizer.watch()
    blocks, before = dense_blocks(model, x, y), [whole(model[i], "value") for i in (0, 2)]

    step(optimizer, model, x, y)
    gradients = [whole(model[i], "grad") for i in (0, 2)]
    updates = [old - whole(model[i], "value") for i, old in zip((0, 2), before, strict=True)]
    step(optimizer, model, x, y)

    told = optimizer.stats.layers
    assert told is not None
    assert told.step == 1
    assert told.gradient_norms == pytest.approx([float(g.norm()) for g in gradients])
    assert told.update_norms == pytest.approx([float(u.norm()) for u in updates])
    cosines = [float((g * u).sum() / g.norm() / u.norm()) for g, u in zip(gradients, updates, strict=True)]
    assert told.cosines == pytest.approx(cosines)
    assert (told.clip_factor is None) == (clip is None)
    if clip is not None:
        assert told.clip_factor is not None
        assert 0 < told.clip_factor < 1
    if damping_form == "exact":  # the other form inverts another matrix than F + damping
        damped = [block + DAMPING * torch.eye(len(block), dtype=F64) for block in blocks]
        kl = sum(float(u.flatten() @ F_ @ u.flatten()) for u, F_ in zip(updates, damped, strict=True)) / 2
        assert told.kl == pytest.approx(kl)
    if isinstance(clip, KLClip):
        assert 2 * told.kl == pytest.approx(clip.max_kl)


def test_lengths_of_single_layers_are_in_their_updates() -> None:
    model, (x, y) = net(), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, momentum=0.0, damping=DAMPING, step_length=LayerWise()))
    optimizer.watch()
    before = [whole(model[i], "value") for i in (0, 2)]

    step(optimizer, model, x, y)
    updates = [old - whole(model[i], "value") for i, old in zip((0, 2), before, strict=True)]
    step(optimizer, model, x, y)

    assert optimizer.stats.layers is not None
    assert optimizer.stats.layers.update_norms == pytest.approx([float(u.norm()) for u in updates])


@pytest.mark.parametrize("method", [EXACT, EKFAC()], ids=["kfac exact", "ekfac"])
def test_spectra_are_the_eigenvalues_of_the_factors(method: Any) -> None:
    model, (x, y) = net(), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, momentum=0.0, damping=DAMPING, preconditioner=method))
    optimizer.watch()
    inputs = torch.cat([x, x.new_ones(N, 1)], 1)
    outputs = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model[1:](outputs), y, reduction="sum"), outputs)
    of_A, of_G = (torch.linalg.eigvalsh(rows.T @ rows / N) for rows in (inputs, g))

    step(optimizer, model, x, y)
    step(optimizer, model, x, y)

    assert optimizer.stats.layers is not None
    told = optimizer.stats.layers.spectra
    assert told.keys() == {"0.A", "0.G", "2.A", "2.G"}
    assert told["0.A"].quantiles[::4] == pytest.approx((float(of_A[0]), float(of_A[-1])))
    assert told["0.G"].quantiles[::4] == pytest.approx((float(of_G[0]), float(of_G[-1])))
    assert told["0.A"].damping == pytest.approx(DAMPING / float(of_G.mean()))
    # The block's damped eigenvalues are a g + damping: with the mean g, the factor's condition number.
    mean = float(of_G.mean())
    condition = (float(of_A[-1]) * mean + DAMPING) / (float(of_A[0]) * mean + DAMPING)
    assert told["0.A"].condition == pytest.approx(condition)


def test_factors_that_are_inverted_without_eigenvalues_tell_none() -> None:
    model, (x, y) = net(), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING))
    optimizer.watch()

    step(optimizer, model, x, y)
    step(optimizer, model, x, y)

    assert optimizer.stats.layers is not None
    assert optimizer.stats.layers.spectra == {}


def test_nothing_is_measured_or_sent_unless_it_is_watched() -> None:
    model, (x, y) = net(), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING, preconditioner=EXACT))

    for _ in range(2):
        step(optimizer, model, x, y)

    assert optimizer.stats.layers is None
    assert "telemetry" not in optimizer.stats.seconds


def test_watching_changes_no_weight() -> None:
    (x, y), weights = batch(torch.float32), []
    for is_watched_ in (False, True):
        model = net(torch.float32)
        optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING, clip=KLClip(max_kl=1e-3)))
        if is_watched_:
            optimizer.watch()
        for _ in range(3):
            step(optimizer, model, x, y)
        weights.append([p.detach().clone() for p in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_steps_are_watched_more_rarely_as_a_run_goes_on() -> None:
    watched = [number for number in range(1, 10_001) if is_watched(number)]

    assert watched[:15] == [*range(1, 16)]
    assert all(later - earlier <= LONGEST for earlier, later in pairwise(watched))
    assert len([number for number in watched if number > 256]) == pytest.approx((10_000 - 256) / LONGEST, abs=1)


def test_step_of_the_burn_in_has_no_update_to_tell_of() -> None:
    model, (x, y) = net(), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING, burn_in=1))
    optimizer.watch()

    told = []
    for _ in range(3):
        step(optimizer, model, x, y)
        told.append(optimizer.stats.layers)

    assert told[1] is None
    assert told[2] is not None
    assert told[2].step == 2


def test_preconditioner_tells_of_its_directions() -> None:
    model, (x, y) = net(), batch()
    preconditioner = Preconditioner(model, NGDConfig(damping=DAMPING))
    preconditioner.watch()

    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        if preconditioner.stats.step == 1:
            norms = [float(whole(model[i], "grad").norm()) for i in (0, 2)]

    assert preconditioner.stats.layers is not None
    assert preconditioner.stats.layers.update_norms == pytest.approx(norms)


STRATEGIES = {
    "owner_sharded": {"kind": "owner_sharded"},
    "all_reduce": {"kind": "all_reduce"},
}


def told_on_ranks(rank: int, world_size: int) -> dict[str, tuple[LayerStats | None, int]]:
    told = {}
    for name, strategy in STRATEGIES.items():
        model, (x, y) = net(), batch()
        config = NGDConfig.model_validate(
            {"lr": LR, "momentum": 0.0, "damping": DAMPING, "preconditioner": EXACT, "strategy": strategy}
        )
        optimizer = NGD(model, config)
        optimizer.watch()
        for _ in range(2):
            step(optimizer, model, x.chunk(world_size)[rank], y.chunk(world_size)[rank])
        told[name] = optimizer.stats.layers, optimizer.stats.bytes_sent["telemetry"]
    return told


@pytest.mark.ranks
def test_each_rank_tells_of_all_layers_what_one_process_would() -> None:
    model, (x, y) = net(), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, momentum=0.0, damping=DAMPING, preconditioner=EXACT))
    optimizer.watch()
    for _ in range(2):
        step(optimizer, model, x, y)
    alone = optimizer.stats.layers
    assert alone is not None

    for of_rank in run_ranks(2, told_on_ranks):
        for name, (told, sent) in of_rank.items():
            assert told is not None, name
            assert told.gradient_norms == pytest.approx(alone.gradient_norms), name
            assert told.update_norms == pytest.approx(alone.update_norms), name
            assert told.cosines == pytest.approx(alone.cosines), name
            assert told.kl == pytest.approx(alone.kl), name
            assert told.spectra.keys() == alone.spectra.keys(), name
            largest = {key: spectrum.quantiles[-1] for key, spectrum in alone.spectra.items()}
            assert {k: s.quantiles[-1] for k, s in told.spectra.items()} == pytest.approx(largest), name
            assert sent == 8 * (2 * 3 + 4 * 7), name  # float64: three products a layer, seven numbers a factor


@pytest.mark.parametrize("device", [CUDA])
def test_watching_never_waits_for_the_device(device: str) -> None:
    model, (x, y) = net(torch.float32).to(device), batch(torch.float32)
    optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING))
    optimizer.watch()
    step(optimizer, model, x.to(device), y.to(device))
    watch = optimizer._watch
    assert watch is not None
    d = {layer.name: torch.ones(layer.shape.gradient, device=device) for layer in optimizer.layers}
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.measure(d, d, torch.device(device))
        watch.send(2, optimizer._update.factors, {}, updates_weights=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    told = watch.take()

    assert told is not None
    assert not any(math.isnan(cosine) for cosine in told.cosines)

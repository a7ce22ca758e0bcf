"""What `watch` tells of each layer, against dense float64 references from the formulas alone."""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig, Preconditioner
from ngd_dist.config import EKFAC, KFAC, LNGD, TKFAC, KLClip, LayerWise, NormClip
from ngd_dist.factors.form import FactorForm
from ngd_dist.inversion import ToInvert
from ngd_dist.inversion.lanczos import WIDTH
from ngd_dist.inversion.spectrum import quantiles
from ngd_dist.statistics.statistic import Key
from ngd_dist.step.layer_watch import LONGEST, is_watched
from ngd_dist.step.spectra import MOST
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


def test_small_factors_that_cholesky_inverts_have_their_own_eigenvalues_and_damping() -> None:
    model, (x, y) = net(), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, momentum=0.0, damping=DAMPING))
    optimizer.watch()
    inputs = torch.cat([x, x.new_ones(N, 1)], 1)
    outputs = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model[1:](outputs), y, reduction="sum"), outputs)
    of_A, of_G = (torch.linalg.eigvalsh(rows.T @ rows / N) for rows in (inputs, g))

    for _ in range(2):
        step(optimizer, model, x, y)

    assert optimizer.stats.layers is not None
    told = optimizer.stats.layers.spectra
    assert not told["0.A"].is_estimate
    assert told["0.A"].quantiles == pytest.approx(tuple(quantiles(of_A).tolist()))
    assert told["0.G"].quantiles == pytest.approx(tuple(quantiles(of_G).tolist()))
    pi = math.sqrt(float(of_A.mean() / of_G.mean()))
    assert told["0.A"].damping == pytest.approx(pi * math.sqrt(DAMPING))
    assert told["0.G"].damping == pytest.approx(math.sqrt(DAMPING) / pi)


def test_factors_are_estimated_a_few_at_a_time_until_all_are_known() -> None:
    model, (x, y) = nn.Sequential(*net()[:2], nn.Linear(4, 4, dtype=F64), nn.Tanh(), *net()[2:]), batch()
    optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING))
    optimizer.watch()

    known = []
    for _ in range(5):
        step(optimizer, model, x, y)
        known.append([*optimizer.stats.layers.spectra] if optimizer.stats.layers else [])

    assert known[:4] == [[], optimizer.statistic_names[:MOST], optimizer.statistic_names[: 2 * MOST], known[4]]
    assert known[4] == optimizer.statistic_names


FORMS: dict[str, tuple[Any, nn.Module, tuple[int, ...]]] = {
    "matrix": (KFAC(), nn.Linear(70, 3), (70,)),
    "rows of the step": (KFAC(), nn.Linear(150, 3), (150,)),  # too large to be stacked, so that rows are kept
    "rows that were drawn": (KFAC(rows=26), nn.Linear(70, 3), (70,)),
    "blocks of groups": (KFAC(), nn.Conv2d(8, 4, 3, groups=4), (8, 3, 3)),
    "traces apart": (TKFAC(), nn.Linear(70, 3), (70,)),
    "unit trace": (LNGD(), nn.Linear(70, 3), (70,)),
}


@pytest.mark.parametrize(("method", "layer", "shape"), FORMS.values(), ids=FORMS)
def test_each_form_of_factor_is_told_as_the_matrix_that_is_inverted(
    method: Any, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(N + 6, *shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    y = torch.randint(3, (N + 6,), generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(layer, nn.Flatten()).to(F64)
    optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING, preconditioner=method))
    optimizer.watch()
    step(optimizer, model, x, y)
    key = Key("0", optimizer.statistic_names[0].removeprefix("0."))
    problem, form = optimizer._curvature.problem(key), optimizer._curvature.statistics[key].spec.form
    assert isinstance(problem, ToInvert)
    assert isinstance(form, FactorForm)
    matrix = problem.factor if problem.factor.shape[-1] == problem.factor.shape[-2] else form.dense(problem.factor)
    values = torch.linalg.eigvalsh(matrix).flatten()
    true = torch.cat([values.new_zeros(form.shape[0] * form.shape[-1] - len(values)), values])

    step(optimizer, model, x, y)

    assert optimizer.stats.layers is not None
    told = optimizer.stats.layers.spectra[str(key)]
    assert told.is_estimate
    assert told.quantiles[-1] == pytest.approx(float(true.max()), rel=1e-2)
    assert told.quantiles[0] >= float(true.min()) - 1e-12
    assert told.damping == pytest.approx(float(problem.damping.mean()))
    exact = (float(true.max()) + told.damping) / (max(0.0, float(true.min())) + told.damping)
    assert told.condition <= exact * (1 + 1e-9)
    assert float((true <= told.quantiles[3] + 1e-12).double().mean()) >= 0.6


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
        torch.manual_seed(0)
        model = wide_net().float()
        optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING, clip=KLClip(max_kl=1e-3)))
        if is_watched_:
            optimizer.watch()
        for _ in range(3):
            step(optimizer, model, x, y)
        weights.append([p.detach().clone() for p in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_steps_are_watched_more_rarely_as_a_run_goes_on() -> None:
    watched = [number for number in range(1, 10_001) if is_watched(number)]

    assert watched[:9] == [*range(1, 8), 8, 10]
    assert all(later - earlier <= LONGEST for earlier, later in pairwise(watched))
    assert len([number for number in watched if number > 128]) == pytest.approx((10_000 - 128) / LONGEST, abs=1)


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


METHODS = {"exact": EXACT, "pi": KFAC()}


def wide_net() -> nn.Sequential:
    """Returns a net with a factor of which the spectrum is an estimate."""
    return nn.Sequential(nn.Linear(5, 30, dtype=F64), nn.Tanh(), nn.Linear(30, 3, dtype=F64))


def told_on_ranks(rank: int, world_size: int) -> dict[tuple[str, str], tuple[LayerStats | None, int]]:
    told = {}
    for name, method in product(STRATEGIES, METHODS):
        torch.manual_seed(0)
        model, (x, y) = wide_net(), batch()
        settings = {"lr": LR, "momentum": 0.0, "damping": DAMPING, "preconditioner": METHODS[method]}
        optimizer = NGD(model, NGDConfig.model_validate(settings | {"strategy": STRATEGIES[name]}))
        optimizer.watch()
        for _ in range(3):
            step(optimizer, model, x.chunk(world_size)[rank], y.chunk(world_size)[rank])
        told[name, method] = optimizer.stats.layers, optimizer.stats.bytes_sent["telemetry"]
    return told


def told_alone(method: str) -> LayerStats:
    torch.manual_seed(0)
    model, (x, y) = wide_net(), batch()
    config = NGDConfig(lr=LR, momentum=0.0, damping=DAMPING, preconditioner=METHODS[method])
    optimizer = NGD(model, config)
    optimizer.watch()
    for _ in range(3):
        step(optimizer, model, x, y)
    assert optimizer.stats.layers is not None
    return optimizer.stats.layers


@pytest.mark.ranks
def test_each_rank_tells_of_all_layers_what_one_process_would() -> None:
    alone_with = {method: told_alone(method) for method in METHODS}
    assert alone_with["pi"].spectra["0.G"].is_estimate

    for of_rank in run_ranks(2, told_on_ranks):
        for (name, method), (told, sent) in of_rank.items():
            alone = alone_with[method]
            assert told is not None, name
            assert told.gradient_norms == pytest.approx(alone.gradient_norms), name
            assert told.update_norms == pytest.approx(alone.update_norms), name
            assert told.cosines == pytest.approx(alone.cosines), name
            assert told.kl == pytest.approx(alone.kl), name
            assert [*told.spectra] == [*alone.spectra] == ["0.A", "0.G", "2.A", "2.G"], name
            for key, spectrum in alone.spectra.items():
                assert told.spectra[key].is_estimate == spectrum.is_estimate, (name, key)
                assert told.spectra[key].quantiles == pytest.approx(spectrum.quantiles, rel=1e-5, abs=1e-9), (name, key)
                assert told.spectra[key].damping == pytest.approx(spectrum.damping), (name, key)
            # float64: three products a layer, seven numbers a factor, and those of a few estimates.
            assert sent == 8 * (2 * 3 + 4 * 7 + MOST * WIDTH), name


@pytest.mark.parametrize("device", [CUDA])
def test_watching_never_waits_for_the_device(device: str) -> None:
    model, (x, y) = net(torch.float32).to(device), batch(torch.float32)
    optimizer = NGD(model, NGDConfig(lr=LR, damping=DAMPING))
    optimizer.watch()
    step(optimizer, model, x.to(device), y.to(device))
    watch, spectra = optimizer._watch, optimizer._curvature.spectra
    assert watch is not None
    assert spectra is not None
    watch.take()
    d = {layer.name: torch.ones(layer.shape.gradient, device=device) for layer in optimizer.layers}
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.measure(d, d, torch.device(device))
        estimates = spectra.estimate(optimizer._curvature.problem)
        watch.send(2, optimizer._update.factors, {}, estimates, updates_weights=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    told = watch.take()

    assert told is not None
    assert not any(math.isnan(cosine) for cosine in told.cosines)
    assert len(told.spectra) == 2 * MOST

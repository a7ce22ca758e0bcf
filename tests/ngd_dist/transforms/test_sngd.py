"""SNGD: gradient steps in the reconstructed model are natural gradient steps, and no refresh changes the function.

W = W' G^-1/2, and G = E[x xᵀ] + epsilon I. The references know W alone.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD
from ngd_dist.config import SNGDConfig
from ngd_dist.errors import CheckpointError, ConfigError
from ngd_dist.transforms import SNGD, TRANSFORMS
from tests.support.ranks import run_ranks

F64 = torch.float64
EPSILON = 0.1


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)


def batches(count: int, samples: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(samples, 6, generator=generator, dtype=F64) * torch.arange(1, 7) + 0.5
        yield x, torch.randint(3, (samples,), generator=generator)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def inputs_of_layers(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [x, torch.tanh(model[0](x))]


class NaturalGradientDescent:
    """Steps of W by lr (momentum m + grad) G^-1, with a G for each linear layer that is made at every T-th step."""

    def __init__(self, model: nn.Module, lr: float, momentum: float, T: int) -> None:
        self.layers, self.model, self.lr, self.momentum, self.T = [model[0], model[2]], model, lr, momentum, T
        self.G = [torch.eye(layer.in_features, dtype=F64) for layer in self.layers]
        self.m = {p: torch.zeros_like(p) for p in model.parameters()}
        self.steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        inputs = inputs_of_layers(self.model, x)
        backward(self.model, x, y)
        metric = {layer.weight: G for layer, G in zip(self.layers, self.G, strict=True)}
        with torch.no_grad():
            for p, m in self.m.items():
                m.mul_(self.momentum).add_(p.grad)
                p -= self.lr * (torch.linalg.solve(metric[p], m.mT).mT if p in metric else m)
        if self.steps % self.T == 0:
            self.G = [a.mT @ a / len(a) + EPSILON * torch.eye(a.shape[1], dtype=F64) for a in inputs]
        self.steps += 1


def reconstructed(model: nn.Module, T: int, **changes: Any) -> SNGD:
    return SNGD(model, SNGDConfig(**{"T": T, "epsilon": EPSILON, "ema_decay": 0.0} | changes))


def gradient_descent(model: nn.Module, lr: float, momentum: float, T: int, steps: int) -> SNGD:
    sngd = reconstructed(model, T)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for x, y in batches(steps):
        backward(model, x, y)
        optimizer.step()
        sngd.step(optimizer)
    return sngd


def distance(model: nn.Module, other: nn.Module) -> float:
    """Returns the largest distance of two layers' weights, relative to their norm."""
    pairs = [(model[i].weight.detach(), other[i].weight.detach()) for i in (0, 2)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_five_gradient_steps_on_the_trained_weights_are_natural_gradient_steps() -> None:
    model = mlp()
    reference = NaturalGradientDescent(copy.deepcopy(model), 0.05, 0.0, T=100)

    gradient_descent(model, 0.05, 0.0, T=100, steps=6)  # the first makes G
    for x, y in batches(6):
        reference.step(x, y)

    assert distance(model, reference.model) < 3e-15


def test_momentum_follows_into_new_coordinates() -> None:
    model = mlp()
    reference = NaturalGradientDescent(copy.deepcopy(model), 0.05, 0.9, T=2)

    gradient_descent(model, 0.05, 0.9, T=2, steps=8)
    for x, y in batches(8):
        reference.step(x, y)

    assert distance(model, reference.model) < 1e-13


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (4, 8, 8)),
    "dilated": (nn.Conv2d(4, 6, (3, 2), dilation=2), (4, 8, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=2, padding_mode="circular"), (4, 8, 8)),
    "3d": (nn.Conv3d(4, 6, 2), (4, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_metric_of_a_convolution_is_that_of_its_patches(kind: str) -> None:
    conv, shape = copy.deepcopy(CONVOLUTIONS[kind][0]).to(F64), CONVOLUTIONS[kind][1]
    x = torch.randn(3, *shape, dtype=F64)
    # The weight's gradient for one output of a group is the sum of its patches: those of all outputs give each patch.
    plain = copy.deepcopy(conv)
    y = plain(x)
    group = y.shape[1] // conv.groups
    rows = []
    for b in range(conv.groups):
        of_outputs = y[:, b * group].flatten()
        patches = [torch.autograd.grad(out, plain.weight, retain_graph=True)[0][b * group] for out in of_outputs]
        rows.append(torch.stack([patch.flatten() for patch in patches]))
    expected = torch.stack([a.mT @ a / len(a) for a in rows])

    sngd = reconstructed(conv, T=1)
    conv(x).sum().backward()
    sngd.step()

    torch.testing.assert_close(sngd.layers[0].moment_BII, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("root", ["eigh", "newton_schulz"])
def test_a_refresh_leaves_the_function_as_it_was(root: str) -> None:
    model = mlp()
    sngd, probe = reconstructed(model, T=1, root=root), next(batches(1))[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    for x, y in batches(4):
        backward(model, x, y)
        optimizer.step()
        with torch.no_grad():
            before = model.eval()(probe)
            sngd.step(optimizer)
            after = model(probe)
        model.train()
        assert float((after - before).abs().max()) < 1e-12
    assert not torch.equal(sngd.layers[0].fisher.roots.root, torch.eye(6, dtype=F64))


def test_folding_gives_the_plain_layers_and_the_same_bits() -> None:
    model = mlp()
    names = list(model.state_dict())
    sngd = gradient_descent(model, 0.05, 0.9, T=2, steps=4)
    x, saved = next(batches(1))[0], sngd.plain_state_dict()
    expected = model(x)

    fresh = mlp()
    fresh.load_state_dict(saved)
    sngd.fold()

    assert {type(module) for module in model} == {nn.Linear, nn.Tanh}
    assert sorted(saved) == sorted(model.state_dict()) == sorted(names)
    assert torch.equal(model(x), expected)
    assert torch.equal(fresh(x), expected)


def test_an_optimizer_goes_on_after_folding() -> None:
    model = mlp()
    sngd = reconstructed(model, T=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = next(batches(1))
    backward(model, x, y)
    optimizer.step()
    expected = model[0].weight.detach().clone()

    sngd.step(optimizer)
    trained = model[0].parametrizations.weight.original
    sngd.fold(optimizer)
    backward(model, x, y)
    optimizer.step()

    assert model[0].weight is trained
    assert not torch.equal(model[0].weight, expected)


def test_momentum_is_that_of_plain_weights_after_folding() -> None:
    model, plain = mlp(), None
    plain = copy.deepcopy(model)
    x, y = next(batches(1))
    buffers = []
    for each, is_reconstructed in ((model, True), (plain, False)):
        sngd = reconstructed(each, T=1) if is_reconstructed else None
        optimizer = torch.optim.SGD(each.parameters(), lr=0.0, momentum=0.9)
        for _ in range(3):
            backward(each, x, y)
            optimizer.step()
            if sngd is not None:
                sngd.step(optimizer)
        if sngd is not None:
            sngd.fold(optimizer)
        buffers.append(optimizer.state[each[0].weight]["momentum_buffer"])

    torch.testing.assert_close(*buffers, rtol=1e-12, atol=1e-13)


def test_the_average_takes_a_share_of_the_old_moment() -> None:
    layer = nn.Linear(2, 1, dtype=F64)
    sngd = SNGD(layer, SNGDConfig(T=1, ema_decay=0.75))

    for scale in (1.0, 3.0):
        layer(torch.full((4, 2), scale, dtype=F64)).sum().backward()
        sngd.step()

    assert sngd.layers[0].moment_BII[0, 0, 1].item() == pytest.approx(0.75 * 1 + 0.25 * 9)


def test_passes_of_an_evaluation_do_not_count() -> None:
    model = mlp()
    x, y = next(batches(1))
    sngd = reconstructed(model, T=1)

    backward(model, x, y)
    model.eval()
    model(100 * x)
    model.train()
    with torch.no_grad():
        model(100 * x)
    sngd.step()

    torch.testing.assert_close(sngd.layers[0].moment_BII[0], x.mT @ x / len(x))


def test_only_the_steps_before_a_refresh_are_measured() -> None:
    model = mlp()
    sngd, measured = reconstructed(model, T=3), []

    for x, y in batches(5):
        backward(model, x, y)
        measured.append(sngd.layers[0]._count > 0)
        sngd.step()

    assert measured == [True, False, False, True, False]


def goes_on(model: nn.Module, sngd: SNGD, optimizer: torch.optim.Optimizer, skip: int, steps: int) -> list[Tensor]:
    for x, y in list(batches(steps))[skip:]:
        backward(model, x, y)
        optimizer.step()
        sngd.step(optimizer)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_goes_on_to_the_same_bits(kind: Callable[..., torch.optim.Optimizer]) -> None:
    def build() -> tuple[nn.Module, SNGD, torch.optim.Optimizer]:
        model = mlp()
        extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, SNGD(model, SNGDConfig(T=2)), kind(model.parameters(), lr=0.01, **extra)

    model, sngd, optimizer = build()
    goes_on(model, sngd, optimizer, 0, 3)
    plain, state, of_optimizer = (copy.deepcopy(part.state_dict()) for part in (model, sngd, optimizer))
    expected = goes_on(model, sngd, optimizer, 3, 8)

    model, sngd, optimizer = build()
    model.load_state_dict(plain)
    sngd.load_state_dict(state)
    optimizer.load_state_dict(of_optimizer)

    found = goes_on(model, sngd, optimizer, 3, 8)
    assert all(map(torch.equal, found, expected))


def test_a_copy_is_a_model_of_its_own() -> None:
    model = mlp()
    gradient_descent(model, 0.05, 0.9, T=1, steps=2)
    x = next(batches(1))[0]
    other = copy.deepcopy(model)
    expected = model(x)

    with torch.no_grad():
        model[0].parametrizations.weight.original.zero_()

    assert torch.equal(other(x), expected)


def test_another_dtype_takes_the_roots_along() -> None:
    model = mlp()
    gradient_descent(model, 0.05, 0.9, T=1, steps=2)
    x = next(batches(1))[0]
    expected = model(x)

    torch.testing.assert_close(model.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def share_of_batch(rank: int, world_size: int) -> list[list[float]]:
    torch.manual_seed(0)
    model = mlp()
    sngd = reconstructed(model, T=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in batches(6):
        backward(model, x[rank::world_size], y[rank::world_size])
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad /= world_size
        optimizer.step()
        sngd.step(optimizer)
    return [p.flatten().tolist() for p in model.parameters()]


@pytest.mark.ranks
def test_two_ranks_take_the_steps_of_one() -> None:
    one, two = run_ranks(1, share_of_batch), run_ranks(2, share_of_batch)

    assert two[0] == two[1]
    for found, expected in zip(two[0], one[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-13)


# --- refused ----------------------------------------------------------------------------------------------------------


class Remembers(torch.optim.SGD):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["basis"] = torch.eye(3)


def test_state_without_coordinates_is_refused() -> None:
    model = mlp()
    sngd, optimizer = reconstructed(model, T=1), Remembers(model.parameters(), lr=0.1)
    backward(model, *next(batches(1)))
    optimizer.step()

    with pytest.raises(ConfigError, match="can't take 'basis' of Remembers to other coordinates"):
        sngd.step(optimizer)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (nn.Sequential(nn.LayerNorm(4)), SNGDConfig()),
        (nn.Linear(8, 4), SNGDConfig(max_inputs=7)),
        (nn.Sequential(nn.Linear(8, 4)), SNGDConfig(exclude=("0",))),
        (nn.Linear(8, 4).requires_grad_(False), SNGDConfig()),
    ],
)
def test_a_model_without_a_layer_is_refused(model: nn.Module, config: SNGDConfig) -> None:
    with pytest.raises(ConfigError, match="and the model has none to train"):
        SNGD(model, config)


def test_a_state_of_another_model_changes_nothing() -> None:
    sngd, model = SNGD(mlp()), mlp()
    other = SNGD(model)
    state = sngd.state_dict()
    state["layers"]["2"]["trained"] = torch.zeros(4, 5)
    before = model[0].weight.detach().clone()

    with pytest.raises(
        CheckpointError, match=r"layer '2' doesn't fit: trained must be a tensor \[3, 5\], got \[4, 5\]"
    ):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="of other layers than the model's: 2"):
        other.load_state_dict({"steps": 0, "layers": {"0": state["layers"]["0"]}})
    assert torch.equal(model[0].weight, before)


def test_ngd_covers_no_reconstructed_layer() -> None:
    model = mlp()
    SNGD(model)

    assert NGD(model).plain_parameters.keys() >= {f"{i}.parametrizations.weight.original" for i in (0, 2)}


def test_tied_and_wide_layers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    model[1].weight = model[0].weight

    sngd = SNGD(model, SNGDConfig(max_inputs=4))

    assert [layer.name for layer in sngd.layers] == ["2"]


def test_every_kind_is_registered() -> None:
    assert {SNGDConfig().kind: SNGD} == TRANSFORMS

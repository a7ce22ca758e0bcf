"""The activation of each layer is found where the model runs it, and its derivative is the right one."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.capture.activations import ELEMENTWISE, is_activation
from ngd_dist.config import KFAC, LayerWise
from tests.reference.lngd import factors
from tests.support.slopes import CONFIG, phi_and_psi, two_layers, weighed, with_ones
from tests.support.tensors import F64


def central_difference(module: nn.Module, x: Tensor) -> Tensor:
    h = 1e-6
    with torch.no_grad():
        return (module(x + h) - module(x - h)) / (2 * h)


SMOOTH = sorted(ELEMENTWISE, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", SMOOTH, ids=lambda kind: kind.__name__)
def test_slopes_are_the_derivatives_of_the_activation(kind: type[nn.Module]) -> None:
    activation = kind().double()
    model, x, y = two_layers(activation)
    optimizer = NGD(model, CONFIG)

    F.cross_entropy(model(x), y).backward()

    slopes = central_difference(activation, model[0](x).detach())
    _, Psi = phi_and_psi(optimizer, "0")
    assert optimizer._capture.activations["0"] == kind.__name__
    # Central differences: h^2 for their own error, 1e-16 / h for rounding; no output lies within h of a kink. torch's
    # Hardsigmoid divides by a 6 whose reciprocal is rounded to float32, 3e-8 off.
    torch.testing.assert_close(Psi[0], weighed(x, slopes**2), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "kind",
    [
        nn.ReLU,
        nn.ReLU6,
        nn.SiLU,
        nn.Mish,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.LeakyReLU,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Hardtanh,
    ],
)
def test_an_activation_in_place_has_the_same_slopes(kind: Callable[..., nn.Module]) -> None:
    found = []
    for inplace in (False, True):
        model, x, y = two_layers(kind(inplace=inplace))
        optimizer = NGD(model, CONFIG)
        F.cross_entropy(model(x), y).backward()
        found.append(phi_and_psi(optimizer, "0"))

    for ours, theirs in zip(*found, strict=True):  # autograd differentiates some from their output when in place
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


BETWEEN = {
    "batch norm": nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
    "layer norm": nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh()),
    "group norm": nn.Sequential(nn.Linear(5, 4), nn.GroupNorm(2, 4), nn.GELU()),
    "dropout": nn.Sequential(nn.Linear(5, 4), nn.Identity(), nn.Dropout(0.5), nn.Sigmoid()),
    "dropout in place": nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5, inplace=True), nn.SiLU()),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_normalisation_or_dropout_hides_no_activation(case: str) -> None:
    model = copy.deepcopy(BETWEEN[case]).double()
    x = torch.randn(8, 5, dtype=F64)
    read: list[Tensor] = []
    activation = model[-1]
    activation.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().clone()))
    optimizer = NGD(model, CONFIG)

    model(x).square().sum().backward()

    _, Psi = phi_and_psi(optimizer, "0")
    slopes = central_difference(activation, read[0])
    assert optimizer._capture.activations["0"] == type(activation).__name__
    torch.testing.assert_close(Psi[0], weighed(x, slopes**2), rtol=1e-7, atol=1e-7)


class Residual(nn.Module):
    """Two layers share one activation module; a third is added to what the activation made; a fourth calls one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(4, 4) for _ in range(4))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.second(self.activation(self.first(x))))
        out: Tensor = torch.tanh(self.fourth(self.activation(x + self.third(x))))
        return out


def test_each_layer_is_told_its_own_activation() -> None:
    torch.manual_seed(0)
    model = Residual()
    optimizer = NGD(model, CONFIG)

    model(torch.randn(3, 4)).sum().backward()

    assert optimizer._capture.activations == {"first": "ReLU", "second": "ReLU", "third": None, "fourth": None}


def test_the_first_activation_that_reads_an_output_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Tanh())  # Tanh reads the very same tensor
    optimizer = NGD(model, CONFIG)

    model(torch.randn(4, 3)).sum().backward()

    assert optimizer._capture.activations == {"0": "ReLU"}


def test_a_layer_that_runs_twice_has_the_slopes_of_both_runs() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=F64)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    optimizer = NGD(model, CONFIG)

    model(x).square().sum().backward()

    Phi, Psi = phi_and_psi(optimizer, "0")
    s = layer(x).detach()
    a_NPI = torch.stack([with_ones(torch.tanh(s)), with_ones(x)], dim=1)
    slopes = 1 / torch.cosh(s) ** 2
    exact_phi, exact_psi = factors(a_NPI, torch.stack([torch.ones_like(slopes), slopes], dim=1))
    torch.testing.assert_close(Phi[0], exact_phi, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(Psi[0] / Psi.sum(), exact_psi, rtol=1e-12, atol=1e-14)


def test_transformers_activations_are_known_by_their_file() -> None:
    activations = pytest.importorskip("transformers.activations")
    model, x, y = two_layers(activations.NewGELUActivation())
    optimizer, torchs = NGD(model, CONFIG), nn.GELU("tanh")

    F.cross_entropy(model(x), y).backward()

    _, Psi = phi_and_psi(optimizer, "0")
    slopes = central_difference(torchs, model[0](x).detach())
    torch.testing.assert_close(Psi[0], weighed(x, slopes**2), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("module", [nn.Softmax(dim=-1), nn.GLU(), nn.RReLU(), nn.Linear(2, 2)])
def test_what_mixes_its_inputs_or_draws_is_no_activation(module: nn.Module) -> None:
    assert not is_activation(module)


def test_a_slope_leaves_the_gradients_of_the_activation_alone() -> None:
    model, x, y = two_layers(nn.PReLU())
    bare = copy.deepcopy(model)
    NGD(model, CONFIG)

    for each in (model, bare):
        F.cross_entropy(each(x), y).backward()

    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), bare.parameters(), strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_activations_are_watched_only_for_a_method_that_asks() -> None:
    activation = nn.Tanh()
    model, *_ = two_layers(activation)

    optimizer = NGD(model, NGDConfig(preconditioner=KFAC(), step_length=LayerWise()))

    assert hooks(activation) == 0
    assert optimizer._capture.activations == {}


def test_hooks_on_activations_go_with_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = NGD(model, CONFIG)
    model(torch.randn(8, 5, dtype=F64)).sum().backward()
    assert hooks(model[1]) == hooks(model[2]) == 1

    del optimizer
    gc.collect()

    assert hooks(model) == 0


def test_a_copy_of_the_model_sets_no_slope() -> None:
    model, x, _ = two_layers()
    optimizer = NGD(model, CONFIG)
    twin = copy.deepcopy(model)

    hidden = model[0](x)
    twin[1](hidden)

    assert optimizer._capture.activations == {"0": None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_the_slopes(reentrant: bool) -> None:
    model, x, y = two_layers()
    x.requires_grad_()
    plain, checkpointed = NGD(model, CONFIG), NGD(model, CONFIG)

    with checkpointed._capture.paused():
        F.cross_entropy(model(x), y).backward()
    with plain._capture.paused():
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        F.cross_entropy(out, y).backward()

    for ours, theirs in zip(phi_and_psi(checkpointed, "0"), phi_and_psi(plain, "0"), strict=True):
        assert torch.equal(ours, theirs)


# torch.compile looks at every attribute of what crosses a graph break, `grad` of inner tensors among them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_statistics_of_the_plain_one(backend: str) -> None:
    model, x, y = two_layers()
    found = []
    for run in (model, torch.compile(model, backend=backend)):
        optimizer = NGD(run, CONFIG.model_copy(update={"burn_in": 2}))
        for _ in range(2):
            F.cross_entropy(run(x), y).backward()
            found.append(phi_and_psi(optimizer, "0"))
            optimizer.step()

    for statistics in found[1:]:
        for ours, theirs in zip(found[0], statistics, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slopes_taken_under_autocast_make_statistics_in_full_precision(dtype: torch.dtype) -> None:
    model, x, y = two_layers(nn.Softplus())
    model, x = model.float(), x.float()
    optimizer = NGD(model, CONFIG)

    with torch.autocast("cpu", dtype=dtype):
        out = model(x)
    F.cross_entropy(out.float(), y).backward()

    Phi, Psi = phi_and_psi(optimizer, "0")
    assert Phi.dtype == Psi.dtype == torch.float32
    exact_phi, _ = factors(with_ones(x).unsqueeze(1), torch.sigmoid(model[0](x).detach()).unsqueeze(1))
    torch.testing.assert_close(Phi[0], exact_phi, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)

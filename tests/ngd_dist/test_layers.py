"""Every module kind: its rows are autograd's gradients, sample by sample, and its statistics those of the formulas."""

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import SGDFallback
from ngd_dist.errors import CaptureError
from ngd_dist.layers import LAYERS, LAYERS_BY_NAME, GateMap, InProjection, TransposedConv
from ngd_dist.statistics.statistic import Key
from tests.reference.layers import kronecker_factors, unit_rows
from tests.support.layer_runs import autograd_sample_gradients, layers_of, sample_gradients, watched
from tests.support.tensors import F64

# A case is a module and the shape of its input. Attention, recurrent modules and transposed convolutions have files of
# their own.
MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(3, 4), (5, 3)),
    "linear without bias": (nn.Linear(3, 4, bias=False), (5, 3)),
    "linear over positions": (nn.Linear(3, 4), (5, 7, 2, 3)),
    "conv": (nn.Conv2d(2, 3, 3), (4, 2, 6, 5)),
    "conv stride": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), bias=False), (4, 2, 7, 6)),
    "conv padding": (nn.Conv2d(2, 3, (3, 5), padding=(2, 1)), (4, 2, 6, 6)),
    "conv same": (nn.Conv2d(2, 3, (2, 5), padding="same"), (4, 2, 6, 6)),
    "conv valid": (nn.Conv2d(2, 3, 3, padding="valid"), (4, 2, 6, 6)),
    "conv dilation": (nn.Conv2d(2, 3, 3, dilation=2, padding=1), (4, 2, 7, 7)),
    "conv dilation in one axis": (nn.Conv2d(2, 3, (3, 2), dilation=(1, 3), stride=(2, 3)), (4, 2, 7, 9)),
    "conv reflect": (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (4, 2, 6, 6)),
    "conv circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (4, 2, 6, 6)),
    "conv replicate same": (nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="replicate"), (4, 2, 6, 6)),
    "conv groups": (nn.Conv2d(4, 6, (3, 2), groups=2, padding=1), (4, 4, 5, 4)),
    "conv depthwise": (nn.Conv2d(3, 6, 3, groups=3, stride=2, bias=False), (4, 3, 7, 6)),
    "conv 1x1": (nn.Conv2d(3, 2, 1), (4, 3, 4, 4)),
    "conv1d": (nn.Conv1d(2, 3, 3, padding=1, stride=2), (4, 2, 9)),
    "conv1d groups reflect": (nn.Conv1d(4, 4, 3, groups=4, padding=2, padding_mode="reflect"), (4, 4, 6)),
    "conv3d": (nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 2), dilation=(2, 1, 1)), (3, 2, 4, 5, 3)),
    "conv3d circular groups": (nn.Conv3d(2, 4, 2, groups=2, padding="same", padding_mode="circular"), (3, 2, 3, 3, 3)),
    "batchnorm": (nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "batchnorm in eval mode": (nn.BatchNorm2d(3).eval(), (4, 3, 5, 5)),
    "batchnorm without running statistics": (nn.BatchNorm2d(3, track_running_stats=False).eval(), (4, 3, 5, 5)),
    "batchnorm without shift": (nn.BatchNorm2d(3, bias=False), (4, 3, 5, 5)),
    "batchnorm of vectors": (nn.BatchNorm1d(3), (6, 3)),
    "batchnorm of sequences": (nn.BatchNorm1d(3), (4, 3, 5)),
    "batchnorm of volumes": (nn.BatchNorm3d(2), (3, 2, 2, 3, 2)),
    "synchronised batchnorm": (nn.SyncBatchNorm(3), (4, 3, 5, 5)),
    "synchronised batchnorm in eval mode": (nn.SyncBatchNorm(3).eval(), (4, 3, 5)),
    "groupnorm": (nn.GroupNorm(2, 4), (3, 4, 5, 2)),
    "groupnorm of vectors": (nn.GroupNorm(2, 6), (3, 6)),
    "layernorm": (nn.LayerNorm(6), (4, 6)),
    "layernorm over positions": (nn.LayerNorm(6), (4, 3, 2, 6)),
    "layernorm of matrices": (nn.LayerNorm((3, 2)), (4, 5, 3, 2)),
    "layernorm without shift": (nn.LayerNorm(6, bias=False), (4, 3, 6)),
    "rmsnorm": (nn.RMSNorm(6), (4, 3, 6)),
    "rmsnorm of matrices": (nn.RMSNorm((3, 2), eps=0.1), (4, 3, 2)),
    "embedding": (nn.Embedding(7, 4), (5, 6)),
    "embedding of one index": (nn.Embedding(7, 4), (5,)),
    "embedding with padding": (nn.Embedding(7, 4, padding_idx=-5), (5, 2, 6)),
}  # fmt: skip
ELSEWHERE = ("timm", "torchvision", "transformers")


def case(name: str) -> tuple[nn.Module, Tensor]:
    """Returns a module with weights and running statistics that are nothing special, and an input for it."""
    torch.manual_seed(0)
    module, shape = MODULES[name]
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    if isinstance(module, nn.Embedding):
        return module, torch.randint(module.num_embeddings, shape)
    return module, 2 * torch.randn(shape, dtype=F64) + 1


def test_every_layer_kind_has_a_case() -> None:
    elsewhere = {module for module, kind in LAYERS.items() if issubclass(kind, InProjection | GateMap | TransposedConv)}

    assert {type(module) for module, _ in MODULES.values()} | elsewhere == {
        module for module in LAYERS if module.__module__.startswith("torch.")
    }


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", MODULES)
def test_rows_give_back_each_samples_gradient(name: str) -> None:
    module, x = case(name)
    (layer,) = layers_of(module)
    output, rows_of = watched([layer], lambda: module(x), len(x))
    gradient = torch.randn_like(output)

    rows = rows_of["layer"](gradient)

    expected = autograd_sample_gradients(layer, output, gradient)
    found = sample_gradients(layer, rows)
    assert found.shape == (len(x), *layer.shape.gradient)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(layer.shape.gradient, dtype=F64)
    along = torch.stack([torch.sum(direction * each) for each in expected])
    torch.testing.assert_close(rows.along(direction), along, rtol=1e-11, atol=1e-11)  # of sums of some 100 terms


@pytest.mark.parametrize("name", MODULES)
def test_split_undoes_join(name: str) -> None:
    module, _ = case(name)
    (layer,) = layers_of(module)
    gradients = [torch.randn_like(p) for p in layer.parameters]

    parts = layer.split(layer.join(gradients))

    assert all(torch.equal(part, gradient) for part, gradient in zip(parts, gradients, strict=True))


KRONECKER = {
    name: (module, shape)
    for name, (module, shape) in MODULES.items()
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", KRONECKER)
def test_factors_are_those_of_the_formula(name: str) -> None:
    module, x = case(name)
    unit_dim = -1 if isinstance(module, nn.Linear) else 1
    groups = getattr(module, "groups", 1)
    optimizer = NGD(module)
    output = module(x)
    gradient = torch.randn_like(output)
    (output * gradient).sum().div(len(x)).backward()

    captured = optimizer._capture.take()

    g_NPO = gradient.movedim(unit_dim, -1).reshape(len(x), -1, output.shape[unit_dim])
    size = g_NPO.shape[-1] // groups
    for block in range(groups):
        units = slice(block * size, (block + 1) * size)
        a_NPI = unit_rows(copy.deepcopy(module), x, units=g_NPO.shape[-1], unit_dim=unit_dim, of_unit=units)
        A, G = kronecker_factors(a_NPI, g_NPO[..., units])
        torch.testing.assert_close(captured[Key("", "A")][block], A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(captured[Key("", "G")][block], G, rtol=1e-12, atol=1e-12)


UNIT_WISE = [name for name, (module, _) in MODULES.items() if "Norm" in type(module).__name__]


@pytest.mark.parametrize("name", UNIT_WISE)
def test_blocks_are_the_second_moments_of_each_units_gradients(name: str) -> None:
    module, x = case(name)
    output = module(x)
    gradient = torch.randn_like(output)
    expected = autograd_sample_gradients(layers_of(module)[0], output, gradient)[:, 0]  # [N, O, 1 or 2]
    optimizer = NGD(module)
    (module(x) * gradient).sum().div(len(x)).backward()

    F_O3 = optimizer._capture.take()[Key("", "F")]

    products = torch.einsum("noi,noj->oij", expected, expected) / len(x)
    rows, columns = torch.triu_indices(*products.shape[1:])
    torch.testing.assert_close(F_O3, products[:, rows, columns], rtol=1e-11, atol=1e-12)


def step_with(model: nn.Module, x: Tensor, gradient: Tensor, damping: float = 0.3) -> None:
    optimizer = NGD(model, NGDConfig(lr=1.0, momentum=0.0, damping=damping))
    (model(x) * gradient).sum().div(len(x)).backward()
    optimizer.step()


class Side(nn.Module):
    """Convolutions side by side, each on its own channels."""

    def __init__(self, whole: nn.Conv2d) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for weight, bias in zip(whole.weight.chunk(whole.groups), whole.bias.chunk(whole.groups), strict=True):  # type: ignore[union-attr]
            part = nn.Conv2d(weight.shape[1], weight.shape[0], whole.kernel_size, padding=whole.padding).double()
            part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
            self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.chunk(len(self.parts), dim=1)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], dim=1)


def test_groups_step_like_convolutions_side_by_side() -> None:
    whole, x = case("conv groups")
    assert isinstance(whole, nn.Conv2d)
    side = Side(whole)
    gradient = torch.randn_like(whole(x))

    step_with(whole, x, gradient)
    step_with(side, x, gradient)

    for ours, theirs in ((whole.weight, "weight"), (whole.bias, "bias")):
        parts = torch.cat([getattr(part, theirs) for part in side.parts])
        torch.testing.assert_close(ours, parts, rtol=1e-12, atol=1e-12)


def test_an_embedding_steps_like_a_linear_layer_of_one_hot_rows() -> None:
    embedding, ids = case("embedding")
    assert isinstance(embedding, nn.Embedding)
    linear = nn.Linear(7, 4, bias=False).double()
    linear.weight = nn.Parameter(embedding.weight.detach().T.clone())
    gradient = torch.randn_like(embedding(ids))

    step_with(embedding, ids, gradient)
    step_with(linear, F.one_hot(ids, 7).double(), gradient)

    torch.testing.assert_close(embedding.weight, linear.weight.T, rtol=1e-12, atol=1e-12)


def test_an_embeddings_factor_counts_its_indices_and_no_padding() -> None:
    embedding, ids = case("embedding with padding")
    assert isinstance(embedding, nn.Embedding)
    padding = embedding.padding_idx
    assert padding == 2
    optimizer = NGD(embedding)
    gradient = torch.randn_like(embedding(ids))
    (embedding(ids) * gradient).sum().div(len(ids)).backward()

    captured = optimizer._capture.take()

    frequencies = [0.0 if i == padding else (ids == i).sum().item() / len(ids) for i in range(7)]
    torch.testing.assert_close(captured[Key("", "A")], torch.tensor([frequencies], dtype=F64))
    real = gradient[ids != padding]
    assert 0 < len(real) < ids.numel()
    torch.testing.assert_close(captured[Key("", "G")][0], real.T @ real / len(real))


def test_a_batch_of_padding_alone_is_finite() -> None:
    embedding = nn.Embedding(5, 3, padding_idx=1)
    optimizer = NGD(embedding)

    embedding(torch.ones(4, 2, dtype=torch.long)).square().sum().backward()

    assert all(bool((value == 0).all()) for value in optimizer._capture.take().values())


def test_an_embedding_never_makes_one_hot_rows() -> None:
    """With 100 000 indices they would take 100 000 x 2 x 512 x 8 bytes = 0.8 GB."""
    embedding = nn.Embedding(100_000, 2)
    optimizer = NGD(embedding)
    ids = torch.randint(100_000, (2, 512))

    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        embedding(ids).square().sum().backward()

    assert Key("", "A") in optimizer._capture.take()
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 20 * 100_000 * 2 * 4


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(5, 2, sparse=True), "Embedding with sparse=True"),
        (nn.Embedding(5, 2, max_norm=1.0), "Embedding with max_norm: its forward pass changes the weights"),
        (
            nn.Embedding(5, 2, scale_grad_by_freq=True),
            "Embedding with scale_grad_by_freq: its gradient is not that of the loss",
        ),
        (nn.LazyLinear(3), "no layer kind covers LazyLinear"),
        (nn.PReLU(), "no layer kind covers PReLU"),
    ],
)
def test_what_cannot_be_described_says_why(module: nn.Module, reason: str) -> None:
    optimizer = NGD(module, NGDConfig(fallback=SGDFallback()))

    assert optimizer.layers == []
    assert set(optimizer.plain_parameters.values()) == {reason}


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (nn.Linear(3, 2), torch.ones(3), r"layer '' needs an input of shape \[samples, ..., inputs\], got \[3\]"),
        (nn.Conv2d(1, 2, 2), torch.ones(1, 4, 4), r"\[samples, channels, height, width\], got \[1, 4, 4\]"),
        (nn.Conv1d(1, 2, 2), torch.ones(1, 4), r"\[samples, channels, length\], got \[1, 4\]"),
        (nn.Conv3d(1, 2, 2), torch.ones(1, 4, 4, 4), r"\[samples, channels, depth, height, width\], got \[1, 4, 4"),
        (nn.LayerNorm((3, 2)), torch.ones(3, 2), r"\[samples, ..., units, units\], got \[3, 2\]"),
        (nn.Embedding(3, 2), torch.tensor(1), r"\[samples, ...\], got \[\]"),
    ],
)  # fmt: skip
def test_an_input_without_samples_is_refused(module: nn.Module, x: Tensor, message: str) -> None:
    optimizer = NGD(module)

    with pytest.raises(CaptureError, match=message):
        module(x)
    assert optimizer.layers  # kept until here: hooks go with their optimizer


@pytest.mark.parametrize("name", ["linear over positions", "layernorm over positions", "embedding"])
def test_samples_may_be_counted_by_dimension_one(name: str) -> None:
    module, x = case(name)
    first, second = layers_of(module)[0], layers_of(module, batch_dim=1)[0]
    output, first_of = watched([first], lambda: module(x), len(x))
    gradient = torch.randn_like(output)
    _, second_of = watched([second], lambda: module(x.movedim(0, 1)), len(x))

    ours = sample_gradients(second, second_of["layer"](gradient.movedim(0, 1)))

    torch.testing.assert_close(ours, sample_gradients(first, first_of["layer"](gradient)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv", "batchnorm", "groupnorm"])
def test_channels_are_never_taken_for_samples(name: str) -> None:
    module, _ = case(name)

    assert layers_of(module, batch_dim=1)[0].batch_dim == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["conv groups", "layernorm", "rmsnorm", "batchnorm", "embedding"])
def test_rows_of_16_bit_modules_are_float32(name: str, dtype: torch.dtype) -> None:
    module, x = case(name)
    module = module.to(dtype)
    x = x if name == "embedding" else x.to(dtype)
    (layer,) = layers_of(module)
    output, rows_of = watched([layer], lambda: module(x), len(x))
    gradient = torch.randn_like(output)

    rows = rows_of["layer"](gradient)

    assert rows.g_BNPO.dtype == torch.float32
    expected = autograd_sample_gradients(layer, output, gradient)
    # autograd's sums are rounded to 16 bits: bfloat16 has 8 of them
    torch.testing.assert_close(sample_gradients(layer, rows), expected, rtol=2**-6, atol=2**-4)


def made_elsewhere(name: str) -> tuple[nn.Module, Tensor]:
    """Returns another library's module by dotted name, and an input."""
    path, _, type_name = name.rpartition(".")
    kind: Any = getattr(pytest.importorskip(path), type_name)
    image = "2d" in type_name or type_name.startswith("GroupNorm")
    arguments = (3, 6) if type_name in ("Linear", "Conv1D") else (6, 2) if type_name == "GroupNorm" else (6,)
    width = 3 if type_name == "Linear" else 6
    return kind(*arguments), torch.randn(4, 6, 3, 2) if image else torch.randn(4, 5, width)


@pytest.mark.parametrize("name", LAYERS_BY_NAME)
def test_modules_of_other_libraries_compute_what_their_kind_says(name: str) -> None:
    torch.manual_seed(0)
    module, x = made_elsewhere(name)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    (layer,) = layers_of(module)
    output, rows_of = watched([layer], lambda: module(x), len(x))
    gradient = torch.randn_like(output)

    found = sample_gradients(layer, rows_of["layer"](gradient))

    torch.testing.assert_close(found, autograd_sample_gradients(layer, output, gradient), rtol=1e-5, atol=1e-5)
    gradients = [torch.randn_like(p) for p in layer.parameters]
    parts = layer.split(layer.join(gradients))
    assert all(torch.equal(part, gradient) for part, gradient in zip(parts, gradients, strict=True))


def test_names_of_other_libraries_are_of_those_that_are_tested() -> None:
    assert {name.partition(".")[0] for name in LAYERS_BY_NAME} == set(ELSEWHERE)
    assert all(import_module(name) for name in ELSEWHERE)

"""What the hooks count and what they do not: several runs, folded batches, checkpointing, compiled models."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval, Gaussian, MonteCarlo
from ngd_dist.errors import CaptureError
from tests.reference.fisher import sample_gradients
from tests.support.tensors import F64, captured


class Unrolled(nn.Module):
    """The same cell at every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for step in range(x.shape[1]):
            state = torch.tanh(self.norm(self.cell(torch.cat([x[:, step], state], dim=1))))
        logits: Tensor = self.head(state)
        return logits


def unrolled() -> tuple[Unrolled, Tensor, Tensor]:
    torch.manual_seed(0)
    return Unrolled().double(), torch.randn(5, 3, 2, dtype=F64), torch.randint(3, (5,))


def test_runs_of_one_module_count_as_positions_of_each_sample() -> None:
    model, x, y = unrolled()
    optimizer = NGD(model)
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        inputs.append(args[0])
        out.register_hook(gradients.append)

    model.cell.register_forward_hook(note)

    F.cross_entropy(model(x), y).backward()

    a = torch.stack([torch.cat([i, torch.ones(5, 1, dtype=F64)], dim=1) for i in inputs], dim=1)
    g = 5 * torch.stack(gradients[::-1], dim=1)  # the last run's gradient comes first
    found = captured(optimizer)
    torch.testing.assert_close(found["cell.A"][0], torch.einsum("npi,npj->ij", a, a) / 5, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["cell.G"][0], torch.einsum("npi,npj->ij", g, g) / 15, rtol=1e-12, atol=0)


def test_per_sample_gradients_are_summed_over_the_runs() -> None:
    model, x, y = unrolled()
    optimizer = NGD(model)

    F.cross_entropy(model(x), y).backward()

    found = captured(optimizer)["norm.F"]
    names = [name for name, _ in model.named_parameters()]
    exact = dict(zip(names, sample_gradients(model, F.cross_entropy, x, y), strict=True))
    scale, shift = exact["norm.weight"], exact["norm.bias"]
    blocks = torch.stack([scale**2, scale * shift, shift**2], dim=-1).mean(0)
    torch.testing.assert_close(found, blocks, rtol=1e-11, atol=1e-16)


def test_a_siamese_pair_is_one_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, z = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval()))

    F.mse_loss(model(x), model(z)).backward()

    rows = torch.cat([torch.cat([x, z]), torch.ones(10, 1, dtype=F64)], dim=1)
    torch.testing.assert_close(captured(optimizer)["0.A"][0], rows.T @ rows / 5, rtol=1e-12, atol=0)
    optimizer.step()


def test_a_forward_pass_that_is_never_differentiated_beside_one_that_is() -> None:
    model, x, y = unrolled()
    plain = NGD(model)
    F.cross_entropy(model(x), y).backward()
    expected = captured(plain)
    optimizer = NGD(model)

    model(3 * x)
    F.cross_entropy(model(x), y).backward()

    assert all(torch.equal(value, expected[name]) for name, value in captured(optimizer).items())


class Windows(nn.Module):
    """Folds parts of each sample into the batch dimension, as window attention and video models do."""

    def __init__(self, folds: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.folds = folds

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1) if self.folds else x
        y: Tensor = self.norm(self.linear(rows)).view(*x.shape[:2], 4).mean(1)
        return y


def test_parts_of_a_sample_in_the_batch_dimension_are_its_positions() -> None:
    found = []
    for folds in (True, False):
        torch.manual_seed(0)
        model, x, y = Windows(folds).double(), torch.randn(4, 6, 3, dtype=F64), torch.randint(4, (4,))
        optimizer = NGD(model)
        F.cross_entropy(model(x), y).backward()
        found.append(captured(optimizer))

    assert found[0].keys() == found[1].keys() == {"linear.A", "linear.G", "norm.F"}
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-18)


def test_rows_that_belong_to_no_sample_are_an_error_that_names_the_layer() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(x.flatten(0, 1)[:7])

    optimizer = NGD(model := Routed())

    with pytest.raises(CaptureError, match=r"layer 'expert' is given 7 samples where the model is given 4.*exclude"):
        model(torch.randn(4, 2, 3))
    assert NGD(model, NGDConfig(exclude=("expert",))).plain_parameters["expert.weight"] == "excluded"
    del optimizer


def test_a_sequence_first_model_says_so() -> None:
    torch.manual_seed(0)
    found = []
    for dim in (0, 1):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double(), torch.randn(5, 2, 3, dtype=F64)
        optimizer = NGD(model, NGDConfig(batch_dim=dim))
        inputs = x if dim == 0 else x.transpose(0, 1)
        model(inputs).square().sum((2, 1 - dim)).mean().backward()
        found.append(captured(optimizer))

    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_accumulation_counts_once(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=F64, requires_grad=True), torch.randint(2, (6,))
    found = []
    for checkpoints in (False, True):
        optimizer = NGD(model, NGDConfig(micro_batches=2))
        for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
            out = checkpoint(model, part, use_reentrant=reentrant) if checkpoints else model(part)
            (F.cross_entropy(out, target) / 2).backward()
        found.append(captured(optimizer))

    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=0)


# torch.compile looks at every attribute of what crosses a graph break, `grad` of inner tensors among them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_counted_as_the_bare_one(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(2, (6,))
    config = NGDConfig(staleness=FixedInterval(steps=2), stagger=0.0)
    weights: list[list[Tensor]] = []

    for net in (model, twin):
        forward: Any = torch.compile(net, backend=backend) if net is model else net
        optimizer = NGD(forward, config)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            optimizer.step()
        weights.append([p.detach() for p in net.parameters()])

    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


class Positioned(nn.Module):
    """Adds a position embedding that is looked up once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        where: Tensor = self.position(torch.eye(2, dtype=x.dtype).unsqueeze(0))
        return x + where


def test_a_run_that_all_samples_share_takes_the_square_of_their_sum() -> None:
    torch.manual_seed(0)
    model, x = Positioned().double(), torch.randn(4, 2, 3, dtype=F64)
    optimizer = NGD(model)

    model(x).square().sum((1, 2)).mean().backward()

    g_NPO = 2 * model(x).detach()
    found = captured(optimizer)
    torch.testing.assert_close(found["position.A"][0], torch.eye(2, dtype=F64))
    total = g_NPO.sum(0)
    torch.testing.assert_close(found["position.G"][0], total.T @ total / (4 * 2))


def test_the_shared_estimate_is_unbiased_for_a_sampled_fisher() -> None:
    torch.manual_seed(0)
    model, x = Positioned().double(), torch.zeros(4, 2, 3, dtype=F64)
    likelihood = Gaussian()

    draws = []
    for seed in range(20):
        optimizer = NGD(
            model, NGDConfig(fisher=MonteCarlo(likelihood=likelihood, positions="sum", samples=100, seed=seed))
        )
        output = model(x)
        optimizer.fisher_backward(output)
        output.sum().backward()
        draws.append(captured(optimizer)["position.G"][0])

    # Every output has unit Fisher. 2,000 draws at two positions: sqrt(2 / 4000) = 2.2 %; four times that.
    torch.testing.assert_close(torch.stack(draws).mean(0), torch.eye(3, dtype=F64), rtol=0, atol=0.09)


def test_an_encoder_that_puts_the_sequence_first_is_read_as_it_is() -> None:
    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first).double()

        class Net(nn.Module):
            def __init__(self, inner: nn.Module, transposes: bool) -> None:
                super().__init__()
                self.inner, self.transposes = inner, transposes

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.inner(x.transpose(0, 1)).transpose(0, 1) if self.transposes else self.inner(x)
                return y

        optimizer = NGD(model := Net(encoder, not batch_first))
        x = torch.randn(4, 8, 8, dtype=F64)
        (model(x) * torch.randn(4, 8, 8, dtype=F64)).sum((1, 2)).mean().backward()
        found.append(captured(optimizer))

    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_an_empty_batch_is_an_error_that_names_the_layer() -> None:
    optimizer = NGD(model := nn.Sequential(nn.Linear(4, 2)))

    with pytest.raises(CaptureError, match="layer '0' is given no samples"):
        model(torch.randn(0, 4))
    assert optimizer.layers

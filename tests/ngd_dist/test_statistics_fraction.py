"""Statistics of a part of the batch: those of exactly its samples, with the training itself left as it is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig, part_of
from ngd_dist.capture.part import samples_in_part
from ngd_dist.config import EKFAC, KFAC, LNGD, SINGD, TKFAC, Eva, Exact, FixedInterval, Gaussian, MonteCarlo, Settings
from ngd_dist.errors import CaptureError, ConfigError
from tests.reference.fisher import gauss_newton_blocks
from tests.support.ranks import run_ranks
from tests.support.tensors import F64, captured, flat

CLASSES = 4
METHODS: dict[str, Settings] = {
    "kfac": KFAC(),
    "reduce": KFAC(sharing="reduce"),
    "ekfac": EKFAC(),
    "tkfac": TKFAC(),
    "eva": Eva(),
    "singd": SINGD(structure="low_rank", width=2),
    "rows": KFAC(rows=4),
}


class Convolutions(nn.Sequential):
    """A convolution, norms that couple no samples, and a head: its samples are [3, 6, 6]."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.LayerNorm(24),
            nn.Linear(24, CLASSES),
        )  # fmt: skip
        self.double()


class Tokens(nn.Module):
    """Embedded tokens, attention over them, and a head for each: its samples are [5] numbers below 7."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embedding(x))
        return self.head(h + self.attention(h, h, h, need_weights=False)[0])


def data(model: nn.Module, samples: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Tokens):
        return torch.randint(7, (samples, 5), generator=generator), torch.randint(
            CLASSES, (samples, 5), generator=generator
        )
    x = torch.randn(samples, 3, 6, 6, dtype=F64, generator=generator)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def one_step(optimizer: NGD, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Leaves the gradient of the mean loss over the micro-batches, which have one size."""
    optimizer.zero_grad()
    for x, y in batches:
        output = model(x)
        optimizer.fisher_backward(output)
        (F.cross_entropy(output.flatten(0, -2), y.flatten()) / len(batches)).backward()


def statistics_of(make: Any, config: NGDConfig, batches: list[tuple[Tensor, Tensor]], steps: int = 1) -> Any:
    """Returns the statistics of the newest of some steps, and the numbers that travel beside them."""
    model = make()
    optimizer = NGD(model, config.model_copy(update={"micro_batches": len(batches)}))
    for step in range(steps):
        one_step(optimizer, model, batches)
        found = captured(optimizer)
        if step < steps - 1:
            optimizer.step()
    return found, optimizer._capture.estimates.counts(optimizer._due, (), torch.device("cpu"))


def test_a_part_is_evenly_spaced_and_never_empty() -> None:
    assert list(samples_in_part(12, 1 / 3)) == [0, 3, 6, 9]
    assert list(samples_in_part(10, 0.3)) == [0, 3, 6]
    assert list(samples_in_part(5, 1e-6)) == [0]
    assert list(samples_in_part(5, 1.0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make", [Convolutions, Tokens])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo", "exact"])
def test_statistics_are_those_of_a_batch_of_the_part_alone(make: Any, method: str, fisher: str) -> None:
    if method == "rows" and fisher == "exact":
        pytest.skip("rows are of one backward pass")
    if method == "eva" and fisher != "empirical":
        pytest.skip("it reads the mean gradient of the loss")
    config = NGDConfig(preconditioner=METHODS[method], fisher={"kind": fisher}, burn_in=9)
    x, y = data(make())
    steps = 2 if method == "ekfac" else 1  # its second moments wait for a basis

    found, counts = statistics_of(make, config.model_copy(update={"statistics_fraction": 1 / 3}), [(x, y)], steps)
    expected, of_part = statistics_of(make, config, [(x[::3], y[::3])], steps)

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
    # Among them the mean squares of both halves of the part, which tell its noise.
    torch.testing.assert_close(counts, of_part)


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
def test_each_micro_batch_gives_its_share(fisher: str) -> None:
    config = NGDConfig(fisher={"kind": fisher}, statistics_fraction=0.5)
    x, y = data(Convolutions())

    found, _ = statistics_of(Convolutions, config, [(x[:6], y[:6]), (x[6:], y[6:])])
    whole = config.model_copy(update={"statistics_fraction": 1.0})
    expected, _ = statistics_of(Convolutions, whole, [(x[:6:2], y[:6:2]), (x[6::2], y[6::2])])

    torch.testing.assert_close(found, expected)


def test_exact_fisher_of_a_part_is_its_gauss_newton_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    x = torch.randn(9, 4, dtype=F64)
    optimizer = NGD(model, NGDConfig(fisher=Exact(likelihood=Gaussian()), statistics_fraction=1 / 3))

    output = model(x)
    optimizer.fisher_backward(output)

    found = captured(optimizer, block=0)
    for name, exact in zip(("0", "1"), gauss_newton_blocks(model, x[::3]), strict=True):
        torch.testing.assert_close(torch.kron(found[f"{name}.G"], found[f"{name}.A"]), exact, rtol=1e-10, atol=1e-12)


class Normalised(nn.Sequential):
    """Batch norm couples the samples, dropout draws random numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
        self.double()


def test_training_itself_is_as_without_a_part() -> None:
    x, y = torch.randn(16, 6, dtype=F64), torch.randint(CLASSES, (16,))
    after: list[dict[str, Tensor]] = []
    for fraction in (1.0, 0.25):
        model = Normalised()
        optimizer = NGD(model, NGDConfig(fisher=MonteCarlo(), statistics_fraction=fraction))
        torch.manual_seed(7)
        one_step(optimizer, model, [(x, y)])
        assert optimizer._capture.fisher_passes == 1
        after.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))

    whole, part = after
    torch.testing.assert_close(part, whole, rtol=0, atol=0)
    assert int(part["1.num_batches_tracked"]) == 1


def test_batch_norm_sees_the_part_alone_in_its_own_pass() -> None:
    x = torch.randn(16, 6, dtype=F64)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).double()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo(), statistics_fraction=0.5))

    optimizer.fisher_backward(model(x))

    part = x[::2]
    a = torch.cat([F.batch_norm(part, None, None, training=True), torch.ones(8, 1, dtype=F64)], 1)
    torch.testing.assert_close(captured(optimizer, block=0)["1.A"], a.T @ a / 8)


def test_empirical_statistics_of_batch_norm_keep_the_normalisation_of_the_batch() -> None:
    x, y = torch.randn(16, 6, dtype=F64), torch.randint(CLASSES, (16,))
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)).double()
    optimizer = NGD(model, NGDConfig(statistics_fraction=0.25))

    one_step(optimizer, model, [(x, y)])

    a = F.batch_norm(x, None, None, training=True)
    g = (model(x).softmax(1) - F.one_hot(y, CLASSES)) @ model[1].weight
    scale, shift = (g * a)[::4].detach(), g[::4].detach()
    blocks = torch.stack([scale * scale, scale * shift, shift * shift], -1).mean(0)
    torch.testing.assert_close(captured(optimizer)["0.F"], blocks)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("positions", ["mean", "sum"])
def test_padding_of_a_part_counts_for_nothing(fisher: str, positions: Any) -> None:
    x, y = data(Tokens())
    y = y.masked_fill(torch.arange(5) >= (torch.arange(12) % 5 + 1).unsqueeze(1), -100)
    config = NGDConfig(fisher={"kind": fisher, "positions": positions}, statistics_fraction=0.5)

    def found(x: Tensor, y: Tensor, loss_of: Tensor, config: NGDConfig) -> dict[str, Tensor]:
        model = Tokens()
        optimizer = NGD(model, config)
        output = model(x)
        optimizer.fisher_backward(output, ignored=y == -100)
        total = F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum")
        (total / loss_of).backward()
        return captured(optimizer)

    count = (y != -100).sum()
    part_x, part_y = x[::2], y[::2]
    part = found(x, y, count, config)
    # The same per-sample gradients: a mean over the part, times its share of the positions.
    whole = NGDConfig(fisher={"kind": fisher, "positions": positions})
    if fisher == "exact":
        expected = found(part_x, part_y, (part_y != -100).sum(), whole)
    else:
        expected = found(part_x, part_y, count / 2, whole)
        if positions == "mean":  # each g stands for a position's own: the mean number of positions is the whole batch's
            scale = float(count / 12 / ((part_y != -100).sum() / 6))
            reads = {name for name in expected if not name.endswith(".A")}
            expected = {name: value * scale if name in reads else value for name, value in expected.items()}
    torch.testing.assert_close(part, expected)


def test_draws_are_the_same_in_each_run_and_differ_between_steps() -> None:
    x, y = data(Convolutions())
    config = NGDConfig(fisher=MonteCarlo(), statistics_fraction=0.5, staleness=FixedInterval(), lr=1e-9)

    first, again = (statistics_of(Convolutions, config, [(x, y)])[0]["5.G"] for _ in range(2))
    second = statistics_of(Convolutions, config, [(x, y)], steps=2)[0]["5.G"]

    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first, second)


def test_statistics_of_the_forward_pass_alone_are_of_the_part_too() -> None:
    x, y = data(Convolutions())
    config = NGDConfig(preconditioner=LNGD(), statistics_fraction=0.5)

    found, _ = statistics_of(Convolutions, config, [(x, y)])
    expected, _ = statistics_of(Convolutions, NGDConfig(preconditioner=LNGD()), [(x[::2], y[::2])])

    torch.testing.assert_close(found, expected)


class Checkpointed(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(nn.Sequential(*list(self)[:3]), x, use_reentrant=False)
        return nn.Sequential(*list(self)[3:])(h)


def test_activation_checkpointing_runs_the_part_again_as_well() -> None:
    x, y = data(Convolutions())
    config = NGDConfig(fisher=MonteCarlo(), statistics_fraction=1 / 3)

    found, _ = statistics_of(Checkpointed, config, [(x, y)])
    expected, _ = statistics_of(Convolutions, config, [(x, y)])

    torch.testing.assert_close(found, expected)


def train_ranks(rank: int, world_size: int, fisher: str, strategy: str) -> Tensor:
    model = Convolutions()
    alone: dict[str, Any] = {"micro_batches": 2} if world_size == 1 else {"strategy": {"kind": strategy}}
    optimizer = NGD(model, NGDConfig(fisher={"kind": fisher}, statistics_fraction=0.5, **alone))
    x, y = data(model)
    for _ in range(2):
        parts = [(x[:6], y[:6]), (x[6:], y[6:])]
        one_step(optimizer, model, parts[rank : rank + 1] if world_size > 1 else parts)
        optimizer.step()
    return flat(model)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["owner_sharded", "all_reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_two_ranks_take_the_steps_of_two_micro_batches(fisher: str, strategy: str) -> None:
    alone = train_ranks(0, 1, fisher, strategy)

    for weights in run_ranks(2, train_ranks, fisher, strategy):
        torch.testing.assert_close(weights, alone)


@pytest.mark.parametrize(("change", "message"), [
    (lambda output: output * 2, r"needs the result of the model itself.*\[12, 4\]"),
    (lambda output: output.clone(), "give it what the model returned"),
])  # fmt: skip
def test_another_tensor_than_the_models_result_is_refused(change: Any, message: str) -> None:
    model = Convolutions()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo(), statistics_fraction=0.5))
    output = model(data(model)[0])

    with pytest.raises(CaptureError, match=message):
        optimizer.fisher_backward(change(output))


class WithMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        return mixing @ self.layer(x)


def test_inputs_that_can_not_be_cut_are_refused() -> None:
    model = WithMatrix()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo(), statistics_fraction=0.5))

    with pytest.raises(CaptureError, match=r"runs the model on 4 of 8 samples first, and it failed there"):
        model(torch.randn(8, 4), torch.randn(8, 8))
    with pytest.raises(CaptureError, match=r"the model's inputs have \[4, 8\] in dimension 0; state it"):
        model(torch.randn(8, 4), torch.randn(4, 8))
    with optimizer.samples(8), optimizer.paused():
        model(torch.randn(8, 4), torch.randn(8, 8))


def test_several_forward_passes_have_a_part_each() -> None:
    model = Convolutions()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo(), statistics_fraction=0.5))
    x, _ = data(model)

    outputs = model(x), model(x + 1)
    optimizer.fisher_backward(outputs)

    a = x.new_ones(12, 25)
    body = nn.Sequential(*list(model)[:5])
    a[:6, :24], a[6:, :24] = body(x[::2]).detach(), body(x[::2] + 1).detach()
    torch.testing.assert_close(captured(optimizer, block=0)["5.A"], a.T @ a / 6)  # a second pass counts as a position


def test_part_of_cuts_what_counts_samples() -> None:
    batch = {"x": torch.arange(8), "mask": torch.ones(3, 3), "names": list("abcdefgh"), "pair": (torch.ones(8, 2), 5)}

    part = part_of(batch, 0.5)

    assert part["x"].tolist() == [0, 2, 4, 6]
    assert part["names"] == list("aceg")
    assert part["mask"].shape == (3, 3)
    assert part["pair"][0].shape == (4, 2)
    assert part["pair"][1] == 5
    assert batch["x"].shape == (8,)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_part_of_refuses_a_fraction_out_of_bounds(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"fraction must be > 0 and <= 1, got {fraction}"):
        part_of(torch.zeros(4), fraction)

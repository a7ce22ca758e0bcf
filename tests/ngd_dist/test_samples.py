"""What counts as a sample, and which positions count: N of each forward pass, padding, what models return."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import (
    AdaptiveInterval,
    Bernoulli,
    Empirical,
    Exact,
    FixedInterval,
    MonteCarlo,
)
from ngd_dist.errors import CaptureError, ConfigError
from tests.support.methods import METHODS
from tests.support.tensors import F64, batch, captured, flat


class Timed(nn.Module):
    """Reads a time beside its batch, as diffusion models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits * t.mean()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


def one_step(run: Callable[[NGD, Timed], Tensor]) -> Tensor:
    model = Timed()
    optimizer = NGD(model, NGDConfig(lr=0.1, momentum=0.0))
    run(optimizer, model).backward()
    optimizer.step()
    return flat(model)


@pytest.mark.parametrize("shape", [(), (1,), (2, 16), (8, 8), (64,), (64, 8)], ids=str)
def test_an_input_that_counts_something_else_is_no_batch(shape: tuple[int, ...]) -> None:
    x, y = batch()

    found = one_step(lambda _, model: F.cross_entropy(model(torch.ones(shape, dtype=F64), x), y))

    expected = one_step(lambda _, model: F.cross_entropy(model(torch.ones((), dtype=F64), x), y))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class Loss(Timed):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(t, x), torch.zeros(len(x), dtype=torch.long))


def test_samples_that_cant_be_told_are_asked_for_and_can_be_stated() -> None:
    x, _ = batch()
    model = Loss()
    optimizer = NGD(model)

    with pytest.raises(CaptureError, match=r"its inputs have \[8, 64\].*optimizer\.samples\(n\)"):
        model(torch.ones(8, 8, dtype=F64), x).backward()

    optimizer.zero_grad()
    with optimizer.samples(64):
        model(torch.ones(8, 8, dtype=F64), x).backward()
    twin = Loss()
    plain = NGD(twin)
    twin(torch.ones((), dtype=F64), x).backward()
    expected = captured(plain)
    assert all(torch.equal(value, expected[name]) for name, value in captured(optimizer).items())
    with pytest.raises(ConfigError, match="samples must be >= 1, got 0"):
        optimizer.samples(0)


def test_a_probe_of_another_size_leaves_no_samples_behind() -> None:
    x, y = batch()
    t = torch.ones((), dtype=F64)

    def probed(_: NGD, model: Timed) -> Tensor:
        model(t, x[:32])
        return model.loss(x, y)

    def outside(_: NGD, model: Timed) -> Tensor:
        model.net(x[:16])
        return model.loss(x, y)

    expected = one_step(lambda _, model: F.cross_entropy(model(t, x), y))
    for run in (probed, outside, lambda _, model: model.loss(x, y)):
        torch.testing.assert_close(one_step(run), expected, rtol=1e-12, atol=0)


class Folded(nn.Module):
    """Its first layer sees windows, its second samples; no call of the model itself tells how many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.window, self.head = nn.Linear(2, 3).double(), nn.Linear(12, 4).double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.window(x.view(-1, 2)).view(len(x), -1)), y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)


def test_layers_that_disagree_outside_the_model_are_an_error_and_can_be_told() -> None:
    x, y = batch()
    model = Folded()
    optimizer = NGD(model)

    with pytest.raises(CaptureError, match=r"layers are given \[64, 256\].*optimizer\.samples\(n\)"):
        model.loss(x, y).backward()

    optimizer.zero_grad()
    with optimizer.samples(64):
        model.loss(x, y).backward()
    found = captured(optimizer)
    twin = Folded()
    plain = NGD(twin)
    twin(x, y).backward()
    assert all(torch.equal(value, found[name]) for name, value in captured(plain).items())


def test_a_list_of_inputs_counts_its_members() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4)).double()

        def forward(self, images: list[Tensor]) -> Tensor:
            logits: Tensor = self.net(torch.stack(images))
            return logits

    torch.manual_seed(0)
    images, y = [torch.randn(3, 4, 4, dtype=F64) for _ in range(6)], torch.randint(0, 4, (6,))
    found = []
    for states in (False, True):
        model = Images()
        optimizer = NGD(model)
        with optimizer.samples(6) if states else nullcontext():
            F.cross_entropy(model(images), y).backward()
        found.append(captured(optimizer))

    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_model_that_calls_itself_or_broke_off_has_the_samples_of_its_batch() -> None:
    class Taught(Timed):
        depth = 0

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            if len(x) == 1:
                raise MemoryError
            logits = super().forward(t, x)
            if self.depth == 0:
                self.depth = 1
                with torch.no_grad():
                    taught = self(t, x[:7])
                self.depth, logits = 0, logits + 0 * taught.mean()
            return logits

    x, y = batch()
    t = torch.ones((), dtype=F64)
    model, plain = Taught(), Timed()
    optimizer, expected = NGD(model), NGD(plain)
    with pytest.raises(MemoryError):
        model(t, x[:1])

    (F.cross_entropy(model(t, x), y) + 0 * model.loss(x, y)).backward()

    (F.cross_entropy(plain(t, x), y) + 0 * plain.loss(x, y)).backward()
    wanted = captured(expected)
    assert all(torch.equal(value, wanted[name]) for name, value in captured(optimizer).items())


def test_fisher_backward_takes_the_outputs_of_many_forward_passes() -> None:
    x, y = batch()
    found = []
    for at_once in (False, True):
        model = Timed()
        optimizer = NGD(model, NGDConfig(fisher=Exact()))
        views = (x, 2 * x.flip(0), 3 * x)
        t = torch.ones((), dtype=F64)
        outputs = (model(t, torch.cat(views)).chunk(3)) if at_once else tuple(model(t, view) for view in views)
        optimizer.fisher_backward(outputs)
        sum(F.cross_entropy(output, y) for output in outputs).backward()
        found.append(captured(optimizer)["net.0.A"])

    # The same rows: as positions of 64 samples, and as 192 samples.
    torch.testing.assert_close(found[0], 3 * found[1])


def test_batches_of_two_sizes_in_one_loss_are_an_error() -> None:
    x, y = batch()
    model = Timed()
    optimizer = NGD(model)
    t = torch.ones((), dtype=F64)
    (F.cross_entropy(model(t, x), y) + F.cross_entropy(model(t, x[:32]), y[:32])).backward()

    with pytest.raises(CaptureError, match=r"batches of \[32, 64\] samples for one loss"):
        optimizer.step()


# --- positions that the loss ignores ----------------------------------------------------------------------------------


def tagger(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, 5)).double()


def tokens(samples: int = 8, positions: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(samples, positions, 6, dtype=F64), torch.randint(0, 5, (samples, positions))


def padded(x: Tensor, y: Tensor, to: int, *, ahead: bool = False) -> tuple[Tensor, Tensor]:
    more = to - x.shape[1]
    sides = (more, 0) if ahead else (0, more)
    return F.pad(x, (0, 0, *sides), value=3.0), F.pad(y, sides, value=-100)


def token_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("staleness", [FixedInterval(), AdaptiveInterval()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_no_step(method: str, ahead: bool, staleness: Any) -> None:
    x, y = tokens()
    weights = []
    for data in ((x, y), padded(x, y, 50, ahead=ahead)):
        model = tagger()
        config = NGDConfig(lr=0.1, damping=1e-3, preconditioner=METHODS[method], staleness=staleness)
        optimizer = NGD(model, config)
        for _ in range(3):
            optimizer.zero_grad()
            token_loss(model(data[0]), data[1]).backward()
            optimizer.step()
        weights.append(flat(model))

    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["kfac", "reduce"])
def test_halves_of_a_ragged_batch_add_up_to_the_whole(method: str) -> None:
    """Adaptive intervals measure noise by halves of the batch; fixed ones do not."""
    x, y = tokens()
    y[:4, 2:], y[6, 1:] = -100, -100
    found = []
    for staleness in (AdaptiveInterval(), FixedInterval()):
        model = tagger()
        optimizer = NGD(model, NGDConfig(preconditioner=METHODS[method], staleness=staleness))
        token_loss(model(x), y).backward()
        found.append(captured(optimizer))

    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-14)


def test_a_probe_through_the_same_forward_pass_makes_no_padding_count() -> None:
    x, y = padded(*tokens(), 50)
    weights = []
    for probes in (True, False):
        model = tagger()
        optimizer = NGD(model, NGDConfig(lr=0.1))
        seen = x.clone().requires_grad_()
        logits = model(seen)
        if probes:
            torch.autograd.grad(logits.sum(), seen, retain_graph=True)
        token_loss(logits, y).backward()
        optimizer.step()
        weights.append(flat(model))

    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)


def test_padding_of_different_lengths_counts_the_positions_that_are_there() -> None:
    x, y = tokens()
    y[:4, 2:] = -100
    model = nn.Linear(6, 5).double()
    optimizer = NGD(model)

    token_loss(model(x), y).backward()

    rows = torch.cat([x[y >= 0], torch.ones(int((y >= 0).sum()), 1, dtype=F64)], 1)
    torch.testing.assert_close(captured(optimizer)[".A"][0], rows.T @ rows / 8)


@pytest.mark.parametrize("fisher", [MonteCarlo(samples=3), Exact()])
def test_padding_changes_no_sampled_step_where_it_is_told_of(fisher: Any) -> None:
    x, y = tokens(4, 3)
    weights = []
    for data in ((x, y), padded(x, y, 6)):
        model = nn.Linear(6, 5).double()
        nn.init.constant_(model.weight, 0.1)
        nn.init.zeros_(model.bias)
        optimizer = NGD(model, NGDConfig(lr=0.1, damping=1e-2, fisher=fisher))
        output = model(data[0])
        optimizer.fisher_backward(output, ignored=data[1] == -100)
        token_loss(output, data[1]).backward()
        weights.append(captured(optimizer)[".A" if fisher.kind == "monte_carlo" else ".G"])

    # Other labels are drawn in a wider output: what reads no label is compared, and G where there is no chance in it.
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)


def test_ignored_of_another_shape_is_refused() -> None:
    x, y = tokens(4, 3)
    model = nn.Linear(6, 5).double()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
    output = model(x)

    with pytest.raises(ConfigError, match=r"ignored must have the output's shape without its classes, \[4, 3\]"):
        optimizer.fisher_backward(output, ignored=y.flatten() == 0)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_damping_means_the_same_at_any_number_of_positions(method: str) -> None:
    """The same tokens as few long sequences and as many short ones, of a loss that is their mean."""
    x, y = tokens(4, 12)
    weights = []
    for samples in (4, 16, 48):
        model = nn.Linear(6, 5).double()
        nn.init.constant_(model.weight, 0.1)
        nn.init.zeros_(model.bias)
        config = NGDConfig(lr=0.1, damping=0.1, fisher=Empirical(positions="mean"), preconditioner=METHODS[method])
        optimizer = NGD(model, config)
        token_loss(model(x.view(samples, -1, 6)), y.view(samples, -1)).backward()
        optimizer.step()
        weights.append(flat(model))

    torch.testing.assert_close(weights[0], weights[2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-9, atol=1e-12)


# --- what models return -----------------------------------------------------------------------------------------------


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda logits: {"loss": logits.sum(), "logits": logits, "hidden_states": (logits * 2,)},
    "dict of another name": lambda logits: {"prediction": logits, "loss": logits.mean()},
    "tuple": lambda logits: (logits.mean(), logits),
    "dataclass": lambda logits: Output(logits.sum(), logits),
    "labels beside": lambda logits: [logits, torch.zeros(3, dtype=torch.long)],
}


@pytest.mark.parametrize("returned", RETURNED)
def test_fisher_backward_reads_the_predictions_of_what_models_return(returned: str) -> None:
    x, y = batch()
    found = []
    for wrap in (RETURNED[returned], lambda logits: logits):
        model = nn.Linear(8, 4).double()
        nn.init.constant_(model.weight, 0.1)
        nn.init.zeros_(model.bias)
        optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
        logits = model(x)
        optimizer.fisher_backward(wrap(logits))
        F.cross_entropy(logits, y).backward()
        found.append(captured(optimizer)[".G"])

    assert torch.equal(*found)


def test_fisher_backward_reads_a_model_output_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
    output = model(torch.randint(20, (4, 6)), labels=torch.tensor([0, 1, 0, 1]), output_hidden_states=True)

    optimizer.fisher_backward(output)
    output.loss.backward()
    optimizer.step()

    assert optimizer.stats.step == 1
    assert all(r.ending == "OK" for r in optimizer.stats.refreshes)


@pytest.mark.parametrize("fisher", ["monte_carlo", "exact"])
def test_two_heads_have_the_fisher_of_both(fisher: Any) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.trunk(x))
            return self.first(hidden), self.second(hidden)

    torch.manual_seed(0)
    model, x = Heads().double(), torch.randn(8, 6, dtype=F64)
    likelihood = Bernoulli()
    sums = []
    for heads in ((0, 1), (0,), (1,)):
        config = {"kind": fisher, "likelihood": likelihood, **({"samples": 100} if fisher == "monte_carlo" else {})}
        draws = []
        for seed in range(20 if fisher == "monte_carlo" else 1):
            own = config | ({"seed": seed} if fisher == "monte_carlo" else {})
            optimizer = NGD(model, NGDConfig.model_validate({"fisher": own}))
            output = model(x)
            optimizer.fisher_backward(tuple(output[head] for head in heads))
            draws.append(captured(optimizer)["trunk.G"])
        sums.append(torch.stack(draws).mean(0))

    both, first, second = sums
    # 2,000 draws over 8 samples: the means of squares scatter by some sqrt(2 / 16000) = 1.1 %; four times that.
    tolerance = 1e-10 if fisher == "exact" else 0.045 * float((first + second).diagonal(0, 1, 2).max())
    torch.testing.assert_close(both, first + second, rtol=1e-10, atol=tolerance)


def test_fisher_backward_without_a_prediction_says_what_it_wants() -> None:
    model = nn.Linear(8, 4).double()
    optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
    model(batch()[0])

    with pytest.raises(ConfigError, match=r"needs what the model returned.*got dict"):
        optimizer.fisher_backward({"loss": torch.zeros(())})

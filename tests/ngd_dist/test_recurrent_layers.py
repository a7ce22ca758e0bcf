"""nn.RNN, LSTM, GRU and their cells: the steps that the fused kernel hides, from the one gradient of all results."""

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC, FixedInterval, MonteCarlo
from ngd_dist.errors import CaptureError
from ngd_dist.layers import LAYERS, CellMap, GateMap
from tests.support.layer_runs import autograd_sample_gradients, layers_of, sample_gradients, watched
from tests.support.tensors import F64, captured

N, T, I, H = 3, 5, 4, 6  # noqa: E741 - the names of the shapes
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn": nn.RNN,
    "relu": lambda *shape, **settings: nn.RNN(*shape, nonlinearity="relu", **settings),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "projected": lambda *shape, **settings: nn.LSTM(*shape, proj_size=2, **settings),
}
CELLS: dict[str, Callable[..., nn.Module]] = {
    "rnn": nn.RNNCell,
    "relu": lambda *shape, **settings: nn.RNNCell(*shape, nonlinearity="relu", **settings),
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "samples first": {"batch_first": True},
    "without bias": {"bias": False},
    "both directions": {"bidirectional": True},
    "three layers": {"num_layers": 3},
    "all of it": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}
LENGTHS = {"whole": None, "ragged": torch.tensor([2, T, 4]), "sorted": torch.tensor([T, 3, 3])}


def randomised(module: nn.Module) -> Any:
    torch.manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return module


def made(kind: str, **settings: Any) -> nn.RNNBase:
    module: nn.RNNBase = randomised(KINDS[kind](I, H, **settings))
    return module


def inputs(samples: int = N) -> Tensor:
    """Returns x [N, T, I]."""
    torch.manual_seed(0)
    return torch.randn(samples, T, I, dtype=F64)


def initial(module: nn.RNNBase, samples: int = N) -> Any:
    chains = module.num_layers * (1 + module.bidirectional)
    torch.manual_seed(2)
    h = torch.randn(chains, samples, module.proj_size or H, dtype=F64)
    return (h, torch.randn(chains, samples, H, dtype=F64)) if isinstance(module, nn.LSTM) else h


def results(module: nn.RNNBase, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the module's outputs and last states as [N, numbers of a sample]."""
    fed: Any = x if module.batch_first else x.transpose(0, 1)
    if lengths is not None:
        is_sorted = bool((lengths.diff() <= 0).all())
        fed = pack_padded_sequence(fed, lengths, batch_first=module.batch_first, enforce_sorted=is_sorted)
    outputs, last = module(fed, state)
    if isinstance(outputs, PackedSequence):
        outputs, _ = pad_packed_sequence(outputs, batch_first=module.batch_first)
    outputs = outputs if module.batch_first else outputs.transpose(0, 1)
    states = last if isinstance(last, tuple) else (last,)
    named = {"outputs": outputs} | {name: state.transpose(0, 1) for name, state in zip("hc", states, strict=False)}
    return {name: value.flatten(1) for name, value in named.items()}


def check_rows(layers: list[Any], call: Callable[[], dict[str, Tensor]]) -> None:
    """Holds the rows of each layer to autograd's gradients, from each of the results alone and from all."""
    widths: dict[str, int] = {}

    def joined() -> Tensor:
        parts = call()
        widths.update({name: part.shape[1] for name, part in parts.items()})
        return torch.cat([*parts.values()], 1)

    output, rows_of = watched(layers, joined, N)
    for read in (*widths, "all"):
        parts = [torch.randn(N, width, dtype=F64) * (read in (name, "all")) for name, width in widths.items()]
        gradient = torch.cat(parts, 1)
        for layer in layers:
            expected = autograd_sample_gradients(layer, output, gradient)
            rows = rows_of[layer.name](gradient)
            torch.testing.assert_close(sample_gradients(layer, rows), expected, rtol=1e-10, atol=1e-12)
            direction = torch.randn(layer.shape.gradient, dtype=F64)
            along = torch.stack([torch.sum(direction * each) for each in expected])
            torch.testing.assert_close(rows.along(direction), along, rtol=1e-10, atol=1e-10)


def test_every_recurrent_module_has_a_case() -> None:
    cases = {type(make(2, 3)) for make in (*KINDS.values(), *CELLS.values())}

    assert cases == {module for module, kind in LAYERS.items() if issubclass(kind, GateMap)}
    assert {type(make(2, 3)) for make in CELLS.values()} == {m for m, kind in LAYERS.items() if kind is CellMap}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_back_each_samples_gradient(kind: str, setting: str, has_state: bool, lengths: str) -> None:
    module = made(kind, **SETTINGS[setting])
    state = initial(module) if has_state else None

    check_rows(layers_of(module), lambda: results(module, inputs(), state, LENGTHS[lengths]))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_rows_of_a_cell_that_runs_several_times_give_back_each_samples_gradient(kind: str, has_bias: bool) -> None:
    cell = randomised(CELLS[kind](I, H, bias=has_bias))

    def call() -> dict[str, Tensor]:
        state, outputs = None, []
        for x in inputs().unbind(1):
            state = cell(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        last = {"c": state[1]} if isinstance(state, tuple) else {}
        return {"outputs": torch.cat(outputs, 1)} | last

    check_rows(layers_of(cell), call)


def test_layers_are_named_after_torchs_weights() -> None:
    lstm = nn.LSTM(I, H, 2, bidirectional=True, proj_size=2)
    ends = ("l0", "l0_reverse", "l1", "l1_reverse")

    assert [layer.name for layer in layers_of(lstm, "a")] == [f"a.{part}{end}" for end in ends for part in ("", "hr_")]
    assert [layer.name for layer in layers_of(nn.GRU(I, H), "")] == ["ih_l0", "hh_l0"]
    assert [layer.name for layer in layers_of(nn.GRUCell(I, H), "a")] == ["a.ih", "a.hh"]
    assert [layer.name for layer in layers_of(nn.RNNCell(I, H), "a")] == ["a"]


def test_split_undoes_join() -> None:
    for layer in (*layers_of(made("projected")), *layers_of(made("gru", bias=False))):
        gradients = [torch.randn_like(p) for p in layer.parameters]
        parts = layer.split(layer.join(gradients))
        assert all(torch.equal(part, gradient) for part, gradient in zip(parts, gradients, strict=True))


class OfLinears(nn.Module):
    """The same LSTM or GRU, step by step: a linear layer of [x, h, 1, 1]; for a GRU, of [x, 1] and of [h, 1]."""

    def __init__(self, whole: nn.RNNBase) -> None:
        super().__init__()
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.is_lstm = isinstance(whole, nn.LSTM)
        ih, hh, *biases = (
            getattr(whole, f"{kind}_l0").detach().view(whole.hidden_size * (3 + self.is_lstm), -1) for kind in kinds
        )
        self.ih = linear_with(torch.cat([ih, hh, *biases] if self.is_lstm else [ih, biases[0]], 1))
        self.hh = nn.Identity() if self.is_lstm else linear_with(torch.cat([hh, biases[1]], 1))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        h, c, one, outputs = x.new_zeros(len(x), H), x.new_zeros(len(x), H), x.new_ones(len(x), 1), []
        for x_t in x.unbind(1):
            if self.is_lstm:
                i, f, g, o = self.ih(torch.cat([x_t, h, one, one], 1)).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                xr, xz, xn = self.ih(torch.cat([x_t, one], 1)).chunk(3, -1)
                hr, hz, hn = self.hh(torch.cat([h, one], 1)).chunk(3, -1)
                z, n = (xz + hz).sigmoid(), (xn + (xr + hr).sigmoid() * hn).tanh()
                h = (1 - z) * n + z * h
            outputs.append(h)
        return torch.stack(outputs, 1), None


def linear_with(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    linear.weight = nn.Parameter(weight.clone())
    return linear


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_module_steps_like_linear_layers_that_run_in_each_step(kind: str, sharing: Any) -> None:
    whole, x = made(kind, batch_first=True), inputs()
    parts = OfLinears(whole)
    gradient = torch.randn(N, T, H, dtype=F64)
    torch.testing.assert_close(whole(x)[0], parts(x)[0])

    for model in (whole, parts):
        optimizer = NGD(model, NGDConfig(lr=1.0, momentum=0.0, damping=0.3, preconditioner=KFAC(sharing=sharing)))
        (model(x)[0] * gradient).sum().div(N).backward()
        optimizer.step()

    moved = OfLinears(whole)
    for ours, theirs in zip(moved.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def captured_from(model: nn.Module, run: Callable[[NGD], Any], **settings: Any) -> dict[str, Tensor]:
    """Returns the statistics of a step in which `run` is called with the optimizer."""
    optimizer = NGD(model, NGDConfig(**settings))
    run(optimizer)
    return captured(optimizer)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_steps_that_a_sample_has_not_count_for_nothing() -> None:
    module, lengths = made("gru", bidirectional=True), LENGTHS["ragged"]
    assert lengths is not None

    def packed(optimizer: NGD) -> None:
        with optimizer.samples(N):
            results(module, inputs(), None, lengths)["outputs"].square().sum().backward()

    found = captured_from(module, packed)

    for name in ("ih_l0", "hh_l0_reverse"):
        assert float(found[f"{name}.A"][0, -1, -1]) == pytest.approx(float(lengths.sum()) / N)
    x = torch.cat([inputs()[n, :length] for n, length in enumerate(lengths.tolist())])
    torch.testing.assert_close(found["ih_l0.A"][0, :-1, :-1], x.T @ x / N)


@pytest.mark.parametrize("kind", KINDS)
def test_two_backward_passes_give_what_their_sum_gives(kind: str) -> None:
    def of(is_apart: bool) -> dict[str, Tensor]:
        module = made(kind, num_layers=2, batch_first=True)

        def run(_: NGD) -> None:
            parts = results(module, inputs())
            losses = [part.square().sum() for part in parts.values()]
            if not is_apart:
                sum(losses).backward()  # type: ignore[union-attr]
                return
            for loss in losses:
                loss.backward(retain_graph=True)

        return captured_from(module, run)

    assert_same(of(True), of(False))


def test_accumulated_micro_batches_are_the_means_of_both() -> None:
    x = inputs(2 * N)

    def of(parts: int) -> dict[str, Tensor]:
        module = made("lstm", batch_first=True)

        def run(_: NGD) -> None:
            for part in x.chunk(parts):
                module(part)[0].square().sum((1, 2)).mean().div(parts).backward()

        return captured_from(module, run, micro_batches=parts)

    assert_same(of(2), of(1))


class Tagger(nn.Module):
    """A recurrent module between two linear layers."""

    def __init__(self, kind: str = "lstm", **settings: Any) -> None:
        super().__init__()
        self.first = randomised(nn.Linear(I, I))
        self.net = made(kind, batch_first=True, **settings)
        self.head = randomised(nn.Linear(H, 3))

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = self.net(self.first(x))
        h = last[0] if isinstance(last, tuple) else last
        logits: Tensor = self.head(outputs + h[-1].unsqueeze(1))
        return logits


@pytest.mark.parametrize("fisher", [MonteCarlo(samples=2), "exact"])
def test_the_passes_of_a_fisher_go_through_the_fused_kernel(fisher: Any) -> None:
    model = Tagger(num_layers=2)
    twin = copy.deepcopy(model)
    parts = OfLinearsIn(twin)

    def run(net: nn.Module) -> Callable[[NGD], None]:
        def of(optimizer: NGD) -> None:
            output = net(inputs())
            optimizer.fisher_backward(output)
            F.cross_entropy(output.flatten(0, 1), torch.arange(N * T) % 3).backward()

        return of

    fisher = {"kind": "exact"} if fisher == "exact" else fisher
    found, expected = captured_from(model, run(model), fisher=fisher), captured_from(parts, run(parts), fisher=fisher)

    names = {f"net.l{layer}": f"net.{layer}.ih" for layer in (0, 1)}
    for ours, theirs in (names | {"first": "first", "head": "head"}).items():
        for factor in "AG":
            torch.testing.assert_close(found[f"{ours}.{factor}"], expected[f"{theirs}.{factor}"], rtol=1e-9, atol=1e-12)


class OfLinearsIn(nn.Module):
    """The same tagger with its LSTM of two layers made of linear layers."""

    def __init__(self, whole: Tagger) -> None:
        super().__init__()
        self.first, self.head = whole.first, whole.head
        self.net = nn.ModuleList()
        for layer in range(2):
            one = nn.LSTM(I if layer == 0 else H, H).double()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(one, f"{name}_l0", nn.Parameter(getattr(whole.net, f"{name}_l{layer}").detach().clone()))
            self.net.append(OfLinears(one))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.net:
            h, _ = layer(h)
        logits: Tensor = self.head(h + h[:, -1:])
        return logits


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_activation_checkpointing_counts_once(kind: str, reentrant: bool) -> None:
    x = inputs().requires_grad_()

    def run(net: nn.RNNBase, is_checkpointed: bool) -> Callable[[NGD], None]:
        def of(_: NGD) -> None:
            outputs = checkpoint(lambda x: net(x)[0], x, use_reentrant=reentrant) if is_checkpointed else net(x)[0]
            outputs.square().sum().backward()

        return of

    first, second = made(kind, batch_first=True), made(kind, batch_first=True)

    assert_same(captured_from(first, run(first, True)), captured_from(second, run(second, False)))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_watching_changes_no_result(kind: str, setting: str, lengths: str) -> None:
    module = made(kind, **SETTINGS[setting])
    fed: Any = inputs() if module.batch_first else inputs().transpose(0, 1)
    if LENGTHS[lengths] is not None:
        fed = pack_padded_sequence(fed, LENGTHS[lengths], batch_first=module.batch_first, enforce_sorted=False)
    plain, plain_last = module(fed)
    optimizer = NGD(module)

    with optimizer.samples(N):
        outputs, last = module(fed)

    assert type(outputs) is type(plain)
    pairs = [(outputs, plain)] if isinstance(plain, Tensor) else zip(outputs, plain, strict=True)
    states = [*zip(last, plain_last, strict=True)] if isinstance(last, tuple) else [(last, plain_last)]
    for ours, theirs in (*pairs, *states):
        assert ours is theirs is None or (torch.equal(ours, theirs) and ours.stride() == theirs.stride())


def test_a_module_is_left_alone_while_nothing_is_due() -> None:
    model = Tagger()
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval(steps=2), stagger=0.0))
    kernel, seen = type(made("lstm")(inputs())[0].grad_fn), []
    model.net.register_forward_hook(lambda module, args, output: seen.append(type(output[1][0].grad_fn)))
    plain = type(made("lstm", batch_first=True)(inputs())[1][0].grad_fn)
    assert kernel

    for _ in range(2):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        model(inputs())
    with optimizer.paused():
        model(inputs())

    assert [kind is plain for kind in seen] == [False, True, False, True]
    assert seen[2] is type(None)


def test_results_may_be_overwritten() -> None:
    x = inputs()

    def run(module: nn.RNNBase, is_in_place: bool) -> Callable[[NGD], None]:
        def of(_: NGD) -> None:
            outputs, h = module(x)
            outputs = F.relu(outputs, inplace=is_in_place)
            (outputs.square().sum() + h.square().sum()).backward()

        return of

    first, second = made("gru", batch_first=True), made("gru", batch_first=True)

    assert_same(captured_from(first, run(first, True)), captured_from(second, run(second, False)))


def test_copies_and_saved_modules_are_not_watched_and_hooks_go_with_the_optimizer() -> None:
    module = made("lstm", batch_first=True)
    optimizer = NGD(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)

    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        twin(inputs())[0].square().sum().backward()

    assert captured(optimizer) == {}
    del optimizer
    gc.collect()
    assert not module._forward_hooks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_steps_like_the_bare_one() -> None:
    model = Tagger()
    twin = copy.deepcopy(model)

    for net in (model, twin):
        forward: Any = torch.compile(net, backend="eager") if net is model else net
        optimizer = NGD(forward, NGDConfig(staleness=FixedInterval(steps=2), stagger=0.0))
        for _ in range(3):
            optimizer.zero_grad()
            forward(inputs()).square().sum((1, 2)).mean().backward()
            optimizer.step()

    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (nn.LSTM(I, H), torch.ones(T, I), r"'l0' needs an input of shape \[positions, samples, inputs\].*got \[5,"),
        (nn.GRUCell(I, H), torch.ones(I), r"'ih' needs an input of shape \[samples, inputs\], got \[4\]"),
    ],
)
def test_a_sequence_without_samples_is_refused(module: nn.Module, x: Tensor, message: str) -> None:
    optimizer = NGD(module)

    with pytest.raises(CaptureError, match=message):
        module(x)
    assert optimizer.layers


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_what_cannot_be_described_says_why() -> None:
    normalised = nn.utils.weight_norm(nn.GRU(I, H), "weight_hh_l0")  # type: ignore[attr-defined]
    reasons = {
        "LSTM with dropout between its layers, which its kernel draws out of sight": nn.LSTM(I, H, 2, dropout=0.1),
        "GRU computes its weight_hh_l0 from other parameters": normalised,
    }
    for reason, module in reasons.items():
        optimizer = NGD(module)
        assert optimizer.layers == []
        assert set(optimizer.plain_parameters.values()) == {reason}


def test_float32_and_16_bits_make_float32_statistics_near_the_exact_ones() -> None:
    exact_model = made("lstm", batch_first=True)
    exact = captured_from(exact_model, lambda _: exact_model(inputs())[0].square().sum().backward())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model, x = copy.deepcopy(exact_model).to(dtype), inputs().to(dtype)

        found = captured_from(model, lambda _, model=model, x=x: model(x)[0].float().square().sum().backward())

        for name, value in exact.items():
            assert found[name].dtype == torch.float32
            error = torch.linalg.vector_norm(found[name] - value) / torch.linalg.vector_norm(value)
            assert error < tolerance, name

"""nn.MultiheadAttention, seen through the functional call that passes by its submodules."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC, FixedInterval
from ngd_dist.errors import CaptureError
from ngd_dist.statistics.statistic import Key
from tests.reference.layers import attention, kronecker_factors
from tests.support.layer_runs import autograd_sample_gradients, layers_of, sample_gradients, watched
from tests.support.tensors import F64

N, L, S, E, HEADS = 3, 5, 4, 8, 2
IS_PADDING = torch.arange(S) >= torch.tensor([[S], [S - 1], [2]])
IS_LATER = torch.ones(L, S, dtype=torch.bool).triu(1)
Call = Callable[[nn.MultiheadAttention, Tensor, Tensor, Tensor], Tensor]
# What the module is made with, and how it is called with x [N, L, E] and y, z [N, S, E].
CALLS: dict[str, tuple[dict[str, Any], Call]] = {
    "self": ({}, lambda m, x, y, z: m(x, x, x)[0]),
    "self without attention weights": ({}, lambda m, x, y, z: m(x, x, x, need_weights=False)[0]),
    "self without bias": ({"bias": False}, lambda m, x, y, z: m(x, x, x)[0]),
    "self by keywords": ({}, lambda m, x, y, z: m(query=x, key=x, value=x)[0]),
    "self in eval mode": ({}, lambda m, x, y, z: m.eval()(x, x, x)[0]),
    "self with a zero to attend to": ({"add_zero_attn": True}, lambda m, x, y, z: m(x, x, x)[0]),
    "cross": ({}, lambda m, x, y, z: m(x, y, y)[0]),
    "cross without attention weights": ({}, lambda m, x, y, z: m(x, y, y, need_weights=False)[0]),
    "cross without bias": ({"bias": False}, lambda m, x, y, z: m(x, y, y)[0]),
    "all different": ({}, lambda m, x, y, z: m(x, y, z)[0]),
    "query is key": ({}, lambda m, x, y, z: m(y, y, z)[0]),
    "masked": ({}, lambda m, x, y, z: m(x, y, y, key_padding_mask=IS_PADDING, attn_mask=IS_LATER)[0]),
}  # fmt: skip


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, L, E, dtype=F64), torch.randn(N, S, E, dtype=F64), torch.randn(N, S, E, dtype=F64)


def attention_module(**settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    module = nn.MultiheadAttention(E, HEADS, **({"batch_first": True} | settings)).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return module


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_rows_give_back_each_samples_gradient(name: str, batch_first: bool) -> None:
    settings, call = CALLS[name]
    module, batch = attention_module(batch_first=batch_first, **settings), 0 if batch_first else 1
    x, y, z = (value if batch_first else value.movedim(0, 1).contiguous() for value in inputs())
    layers = layers_of(module)
    output, rows_of = watched(layers, lambda: call(module, x, y, z), N)
    gradient = torch.randn_like(output)

    for layer in layers:
        rows = rows_of[layer.name](gradient)

        expected = autograd_sample_gradients(layer, output, gradient, batch_dim=batch)
        torch.testing.assert_close(sample_gradients(layer, rows), expected, rtol=1e-12, atol=1e-12)
        direction = torch.randn(layer.shape.gradient, dtype=F64)
        along = torch.stack([torch.sum(direction * each) for each in expected])
        torch.testing.assert_close(rows.along(direction), along, rtol=1e-11, atol=1e-11)
    assert [layer.name for layer in layers] == ["layer.in_proj", "layer.out_proj"]


@pytest.mark.parametrize("name", ["self", "cross", "all different"])
def test_factors_are_those_of_the_formula(name: str) -> None:
    module, (x, y, z) = attention_module(), inputs()
    values = {"self": (x, x, x), "cross": (x, y, y), "all different": (x, y, z)}[name]
    weights = [p.detach() for p in (*module.in_proj_weight.chunk(3), module.out_proj.weight)]
    biases = [p.detach() for p in (*module.in_proj_bias.chunk(3), module.out_proj.bias)]
    leaves = [bias.clone().requires_grad_() for bias in biases]  # so that what follows has gradients
    output, projected, joint = attention(*values, weights, leaves, HEADS)
    gradient = torch.randn_like(output)
    gs = torch.autograd.grad(output, [*projected, output], gradient)
    optimizer = NGD(module)
    found = module(*values)[0]
    torch.testing.assert_close(found, output)
    (found * gradient).sum().div(N).backward()

    captured = optimizer._capture.take()

    ones = torch.ones(N, 1, 1, dtype=F64)
    rows = [torch.cat([a.detach(), ones.expand(-1, a.shape[1], 1)], dim=-1) for a in (*values, joint)]
    for number, (a_NPI, g_NPO) in enumerate(zip(rows, gs, strict=True)):
        layer, block = ("in_proj", number) if number < 3 else ("out_proj", 0)
        A, G = kronecker_factors(a_NPI, g_NPO)
        torch.testing.assert_close(captured[Key(layer, "A")][block], A, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(captured[Key(layer, "G")][block], G, rtol=1e-11, atol=1e-12)


class FourLinears(nn.Module):
    """The same attention of nn.Linear alone."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(E, E).double() for _ in range(4))
        weights = (*whole.in_proj_weight.chunk(3), whole.out_proj.weight)
        biases = (*whole.in_proj_bias.chunk(3), whole.out_proj.bias)
        for linear, weight, bias in zip(self.maps, weights, biases, strict=True):
            linear.weight, linear.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        pairs = zip(self.maps, (query, key, value), strict=False)
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).movedim(-2, 1) for linear, x in pairs)
        joint: Tensor = F.scaled_dot_product_attention(q, k, v).movedim(1, -2).flatten(-2)
        return self.maps[3](joint), None


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("is_cross", [False, True])
def test_attention_steps_like_four_linear_layers(is_cross: bool, sharing: Any) -> None:
    whole, (x, y, _) = attention_module(), inputs()
    parts = FourLinears(whole)
    values = (x, y, y) if is_cross else (x, x, x)
    gradient = torch.randn(N, L, E, dtype=F64)

    for model in (whole, parts):
        config = NGDConfig(lr=1.0, momentum=0.0, damping=0.3, preconditioner=KFAC(sharing=sharing))
        optimizer = NGD(model, config)
        (model(*values)[0] * gradient).sum().div(N).backward()
        optimizer.step()

    weights = (*whole.in_proj_weight.chunk(3), whole.out_proj.weight)
    biases = (*whole.in_proj_bias.chunk(3), whole.out_proj.bias)
    for linear, weight, bias in zip(parts.maps, weights, biases, strict=True):
        torch.testing.assert_close(weight, linear.weight, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(bias, linear.bias, rtol=1e-11, atol=1e-12)


def captured_from(model: nn.Module, run: Callable[[nn.Module], Tensor], **settings: Any) -> dict[str, Tensor]:
    optimizer = NGD(model, NGDConfig(**settings))
    run(model).square().sum().backward()
    return {str(key): value for key, value in optimizer._capture.take().items()}


def test_what_counts_samples_changes_nothing() -> None:
    first, (x, y, _) = attention_module(), inputs()
    second = attention_module(batch_first=False)

    ours = captured_from(first, lambda m: m(x, y, y)[0])
    theirs = captured_from(second, lambda m: m(x.movedim(0, 1), *[y.movedim(0, 1)] * 2)[0], batch_dim=1)

    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_training", [True, False])
def test_encoder_and_decoder_layers_are_seen_in_train_and_in_eval_mode(is_training: bool) -> None:
    model = nn.Transformer(E, HEADS, 1, 1, 16, dropout=0.0, batch_first=True).double().train(is_training)
    x, y, _ = inputs()

    captured = captured_from(model, lambda m: m(x, y))

    attentions = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    expected = {f"{name}.{part}.{factor}" for name in attentions for part in ("in_proj", "out_proj") for factor in "AG"}
    assert expected <= captured.keys()
    assert all(bool(torch.isfinite(value).all()) for value in captured.values())


def test_watching_changes_no_result() -> None:
    module, (x, y, _) = attention_module(dropout=0.4), inputs()
    torch.manual_seed(2)
    plain = module(x, y, y)
    optimizer = NGD(module)

    torch.manual_seed(2)
    seen = module(x, y, y)

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, plain, strict=True))
    assert optimizer.layers


def test_inference_keeps_torchs_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (x, *_) = attention_module().eval(), inputs()
    optimizer = NGD(module)
    fused, calls = torch._native_multi_head_attention, []
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: calls.append(1) or fused(*args))

    with torch.no_grad():
        module(x, x, x)

    assert calls == [1]
    assert optimizer._capture.take() == {}


def test_a_copy_is_not_watched() -> None:
    module, (x, *_) = attention_module(), inputs()
    optimizer = NGD(module)
    twin = copy.deepcopy(module)

    twin(x, x, x)[0].square().sum().backward()

    assert optimizer._capture.take() == {}
    assert _get_current_function_mode_stack() == []
    module(x, x, x)[0].square().sum().backward()
    assert len(optimizer._capture.take()) == 4


def test_hooks_go_with_the_optimizer() -> None:
    module = attention_module()
    optimizer = NGD(module)
    assert module._forward_pre_hooks

    del optimizer
    gc.collect()

    assert not module._forward_pre_hooks
    assert not module._forward_hooks


def test_an_error_inside_leaves_nothing_behind() -> None:
    module, (x, *_) = attention_module(), inputs()
    optimizer = NGD(module)

    with pytest.raises(AssertionError, match="embedding dimension"):
        module(x[..., :4], x[..., :4], x[..., :4])

    assert _get_current_function_mode_stack() == []
    module(x, x, x)[0].square().sum().backward()
    assert len(optimizer._capture.take()) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    x = inputs()[0].requires_grad_()

    def again(module: nn.Module) -> Tensor:
        output: Tensor = checkpoint(lambda x: module(x, x, x)[0], x, use_reentrant=reentrant)
        return output

    plain = captured_from(attention_module(), lambda m: m(x, x, x)[0])
    found = captured_from(attention_module(), again)

    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)
    assert _get_current_function_mode_stack() == []


# torch.compile looks at every attribute of what crosses a graph break, `grad` of inner tensors among them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_steps_like_the_bare_one(backend: str) -> None:
    model, (x, y, _) = attention_module(), inputs()
    twin = copy.deepcopy(model)
    config = NGDConfig(staleness=FixedInterval(steps=2), stagger=0.0)

    for net in (model, twin):
        forward: Any = torch.compile(net, backend=backend) if net is model else net
        optimizer = NGD(forward, config)
        for _ in range(3):
            optimizer.zero_grad()
            forward(x, y, y)[0].square().sum(-1).mean().backward()
            optimizer.step()

    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_default_device_hides_nothing() -> None:
    x, *_ = inputs()

    with torch.device("cpu"):
        captured = captured_from(attention_module(), lambda m: m(x, x, x)[0])

    assert len(captured) == 4


def test_statistics_are_formed_in_full_precision_under_autocast() -> None:
    x = inputs()[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = captured_from(attention_module().float(), lambda m: m(x, x, x)[0])

    exact = captured_from(attention_module(), lambda m: m(x.double(), x.double(), x.double())[0])
    assert {value.dtype for value in captured.values()} == {torch.float32}
    for name, value in exact.items():
        error = torch.linalg.vector_norm(captured[name] - value) / torch.linalg.vector_norm(value)
        assert error < 0.1, name  # bfloat16 rounds to 2^-8, over a chain of some ten products


def test_a_sequence_without_samples_is_refused() -> None:
    module = attention_module()
    optimizer = NGD(module)

    with pytest.raises(CaptureError, match=r"'in_proj' needs an input of shape \[positions, samples, inputs\]"):
        module(*[torch.randn(L, E, dtype=F64)] * 3)
    assert optimizer.layers


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kdim": 4}, "MultiheadAttention with kdim or vdim other than embed_dim"),
        ({"vdim": 4}, "MultiheadAttention with kdim or vdim other than embed_dim"),
        ({"add_bias_kv": True}, "MultiheadAttention with add_bias_kv"),
    ],
)
def test_what_cannot_be_described_says_why(settings: dict[str, Any], reason: str) -> None:
    optimizer = NGD(attention_module(**settings))

    assert optimizer.layers == []
    assert reason in optimizer.plain_parameters.values()

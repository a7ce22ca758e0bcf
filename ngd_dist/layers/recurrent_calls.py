"""Watches the calls of a recurrent module, and lets one gradient tell of all results: outputs and last states."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils.hooks import RemovableHandle

from ngd_dist.layers.base import OnRun, awaits
from ngd_dist.layers.hooks import ModuleHook, tensors_in
from ngd_dist.layers.recurrent_run import KINDS, Chain, RecurrentRun, padded
from ngd_dist.layers.recurrent_steps import Weights

__all__ = ["CellCalls", "RecurrentCalls"]


class _Call(NamedTuple):
    """A call in the form of all: steps first, then samples.

    `seen`: the input that listeners are given; it has no samples if the call has none. `results`: "outputs", packed if
    the call is, and the last "h" and "c".
    """

    seen: Tensor
    x: Tensor
    states: tuple[Tensor, ...]
    results: dict[str, Tensor]
    packing: PackedSequence | None = None
    lengths: Tensor | None = None


class RecurrentCalls:
    """The calls of one module, whose layers share them. `latest`: the run, while listeners are called.

    A call that no listener awaits goes by untouched.
    """

    def __init__(self, module: nn.Module) -> None:
        self.latest: RecurrentRun | None = None
        self._module = module
        self._listeners: OrderedDict[int, OnRun] = OrderedDict()
        self._parameters = dict(module.named_parameters(recurse=False))

    @property
    def chains(self) -> list[Chain]:
        """The directions of all layers, in torch's order."""
        module = self._module
        assert isinstance(module, nn.RNNBase)
        return [Chain(layer, end) for layer in range(module.num_layers) for end in range(1 + module.bidirectional)]

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """Torch's names of the weights of a chain, those together that have one output gradient."""
        of_gates: list[tuple[str, ...]] = [("ih",), ("hh",)] if self._kind == "GRU" else [("ih", "hh")]
        return [*of_gates, ("hr",)] if getattr(self._module, "proj_size", 0) else of_gates

    def suffix(self, chain: Chain) -> str:
        """Returns the end of torch's names of the chain's parameters."""
        return f"_l{chain.layer}{'_reverse' if chain.direction else ''}"

    def watch(self, on_run: OnRun) -> list[RemovableHandle]:
        """Returns the handles of hooks that call `on_run` with [T, N, I] and the tensor that has all results in it."""
        listener = RemovableHandle(self._listeners)
        self._listeners[listener.id] = on_run

        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
            # One hook acts for all listeners. If it was removed while the module ran, torch leaves out kwargs.
            if len(rest) == 2 and next(iter(self._listeners), None) == listener.id:
                return self._on_call(args, *rest)
            return None

        # Before all other hooks: the weights are still whole, and those of engines see the results that go on.
        handle = self._module.register_forward_hook(ModuleHook(hook), with_kwargs=True, prepend=True)
        return [listener, handle]

    def _on_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Returns what takes the place of the module's results; None: they stay."""
        listeners = list(self._listeners.values())
        first = next(tensors_in(output))
        if not (torch.is_grad_enabled() and first.requires_grad and any(map(awaits, listeners))):
            for on_run in listeners:
                on_run(next(tensors_in((args, kwargs))), first)
            return None
        call = self._call(*_arguments(args, kwargs), output)
        alone = len(call.results) == 1
        joined = output if alone else torch.cat([result.reshape(-1) for result in call.results.values()])
        self.latest = self._run(call)
        try:
            for on_run in listeners:
                on_run(call.seen, joined)
        finally:
            self.latest = None
        return None if alone else self._replaced(output, _apart(joined, call.results))

    def _run(self, call: _Call) -> RecurrentRun:
        outputs = call.results["outputs"].detach()
        own = next(iter(self._parameters.values()))
        return RecurrentRun(
            kind=KINDS[self._kind],
            x=call.x.detach(),
            outputs=outputs if call.packing is None else padded(outputs, call.packing),
            states=tuple(state.detach() for state in call.states),
            weights={chain: self._weights(chain) for chain in self.chains},
            returned={name: result.shape for name, result in call.results.items()},
            dtype=torch.float64 if own.dtype == torch.float64 else torch.float32,
            lengths=call.lengths,
            packing=call.packing,
        )

    def _weights(self, chain: Chain) -> Weights:
        suffix = self.suffix(chain)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return Weights(*(self._kept(f"{name}{suffix}") for name in names))  # type: ignore[arg-type]

    def _kept(self, name: str) -> Tensor | None:
        held: Tensor | None = getattr(self._module, name, None)
        if held is None:
            return None
        # An engine that puts other tensors in place of the parameters for a while frees them afterwards.
        is_own, weight = held is self._parameters.get(name), held.detach()
        return weight if is_own else weight.clone()

    @property
    def _kind(self) -> str:
        assert isinstance(self._module, nn.RNNBase)
        return self._module.mode

    def _call(self, x: Any, state: Any, output: Any) -> _Call:
        outputs, last = output
        if isinstance(x, PackedSequence):
            x, lengths = pad_packed_sequence(x)
            results = {"outputs": outputs.data} | _named(_states(last))
            return _Call(x, x, _states(state), results, outputs, lengths)
        if x.ndim == 2:
            results = {"outputs": outputs.unsqueeze(1)} | _named(_states(last, 1))
            return _Call(x, x.unsqueeze(1), _states(state, 1), results)
        x = self._turned(x)
        return _Call(x, x, _states(state), {"outputs": self._turned(outputs)} | _named(_states(last)))

    def _replaced(self, output: Any, results: dict[str, Tensor]) -> Any:
        """Returns the results in the form of the module's output."""
        before, last = output
        outputs, *states = results.values()
        new: Any = outputs
        if isinstance(before, PackedSequence):
            new = PackedSequence(outputs, before.batch_sizes, before.sorted_indices, before.unsorted_indices)
        elif before.ndim == 2:
            new, states = outputs.squeeze(1), [state.squeeze(1) for state in states]
        else:
            new = self._turned(outputs)
        return new, tuple(states) if isinstance(last, tuple) else states[0]

    def _turned(self, x: Tensor) -> Tensor:
        """Returns [T, N, ...] from the module's order, or back."""
        return x.transpose(0, 1) if self._module.batch_first else x


class CellCalls(RecurrentCalls):
    """The calls of a cell: one step, of one layer."""

    @property
    def chains(self) -> list[Chain]:
        return [Chain(0, 0)]

    def suffix(self, chain: Chain) -> str:
        return ""

    @property
    def _kind(self) -> str:
        cell = self._module
        if isinstance(cell, nn.LSTMCell | nn.GRUCell):
            return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"
        return f"RNN_{cell.nonlinearity}".upper()

    def _call(self, x: Tensor, state: Any, output: Any) -> _Call:
        # [1, N, ...]; a call without samples has one.
        one, *states = (tensor.reshape(1, -1, tensor.shape[-1]) for tensor in (x, *_states(state)))
        results = [tensor.reshape(1, -1, tensor.shape[-1]) for tensor in _states(output)]
        named = dict(zip(("outputs", "c"), results, strict=False))
        return _Call(x if x.ndim == 1 else one, one, tuple(states), named)

    def _replaced(self, output: Any, results: dict[str, Tensor]) -> Any:
        return tuple(new.view_as(old) for old, new in zip(output, results.values(), strict=True))


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Returns the input and the initial state, None if there is none."""
    named = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    return named["input"], named.get("hx")


def _states(state: Any, samples_at: int | None = None) -> tuple[Tensor, ...]:
    """Returns h, or h and c, with a dimension for samples put in; nothing for None."""
    states = () if state is None else state if isinstance(state, tuple) else (state,)
    return states if samples_at is None else tuple(tensor.unsqueeze(samples_at) for tensor in states)


def _named(states: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("h", "c"), states, strict=False))


def _apart(joined: Tensor, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parts of the joined tensor, as views in the shapes of the results."""
    parts, start = dict[str, Tensor](), 0
    for name, result in results.items():
        parts[name] = joined.narrow(0, start, result.numel()).view(result.shape).to(result.dtype)
        start += result.numel()
    return parts

"""nn.RNN, nn.LSTM, nn.GRU and their cells: a layer for each weight of each direction of each layer of the module.

The fused kernel runs as ever. If a statistic is due, a hook puts copies of the module's results in their place, views
of one tensor, whose gradient is that of all results together; from it a scan backward makes the gradients of the gates.
The steps of a sample are its positions, and all gates together are one layer's outputs: G has the moments between
gates, and A, which they have in common, is kept once.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ngd_dist.engines import class_of
from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.base import Layer, OnRun
from ngd_dist.layers.recurrent_calls import CellCalls, RecurrentCalls
from ngd_dist.layers.recurrent_run import Chain, RecurrentRun

__all__ = ["CellMap", "GateMap"]


class GateMap(Layer):
    """Weights of a recurrent module that have one output gradient, with their biases.

    parts: "ih" and "hh" together, since z = W_ih x + W_hh h + b_ih + b_hh is one linear map of [x, h, 1, 1]. For a GRU
    apart: its kernel multiplies the h part of n by r. "hr" projects an LSTM's state. Runs are [T, N, I], whatever
    `batch_first` says.
    """

    module: nn.RNNBase | nn.RNNCellBase

    def __init__(self, name: str, module: nn.Module, calls: RecurrentCalls, chain: Chain, parts: Sequence[str]) -> None:
        self._calls, self._chain, self._parts = calls, chain, parts
        self._suffix = calls.suffix(chain)
        super().__init__(name, module, batch_dim=1)

    @classmethod
    def split_module(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> list[Layer]:
        calls, layers = cls._calls_of(module), list[Layer]()
        for chain in calls.chains:
            suffix = calls.suffix(chain)
            for parts in calls.parts:
                # As torch's names of the weights: "l0" for both weights of an LSTM, "ih_l0" for one of a GRU.
                own = f"{'' if len(parts) > 1 else parts[0]}{suffix}".removeprefix("_")
                layers.append(cls(".".join(filter(None, (name, own))), module, calls, chain, parts))
        return layers

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.RNNBase)
        kind = class_of(module).__name__
        if module.num_layers > 1 and module.dropout > 0:
            return f"{kind} with dropout between its layers, which its kernel draws out of sight"
        return computed(module, [str(name) for names in module._all_weights for name in names])

    def watch(self, on_run: OnRun) -> list[RemovableHandle]:
        return self._calls.watch(on_run)

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim == 3 else "[positions, samples, inputs] (samples first with batch_first)"

    @cached_property
    def shape(self) -> LayerShape:
        widths = [shape.numel() // shape[0] for shape in self.shapes]
        return LayerShape(self.name, "kronecker", sum(widths), self.shapes[0][0])

    def keep(self, x: Tensor, output: Tensor) -> RecurrentRun:
        run = self._calls.latest
        assert run is not None
        return run

    def inputs(self, kept: RecurrentRun) -> Tensor:
        steps = kept.steps(self._chain)
        sources = {"ih": lambda: steps.x, "hh": lambda: steps.before_TNP, "hr": lambda: steps.unprojected_TNH}
        rows = [sources[part]() for part in self._parts]
        biases = len(self.shapes) - len(rows)
        rows_TNI = torch.cat([*rows, rows[0].new_ones(*rows[0].shape[:2], biases)], -1)
        is_step = kept.is_step_TN1
        return (rows_TNI if is_step is None else rows_TNI * is_step).transpose(0, 1).unsqueeze(0)

    def output_gradients(self, kept: RecurrentRun, g: Tensor) -> Tensor:
        rows_TNO: Tensor = getattr(kept.gradients(g)[self._chain], self._parts[0])
        return rows_TNO.transpose(0, 1).unsqueeze(0)

    def positions(self, kept: RecurrentRun, g_BNPO: Tensor) -> tuple[float, ...]:
        return (kept.positions,)

    def rows(self, kept: RecurrentRun, g: Tensor) -> int:
        return kept.rows

    @classmethod
    def _calls_of(cls, module: nn.Module) -> RecurrentCalls:
        return RecurrentCalls(module)

    def _own_parameters(self) -> list[nn.Parameter]:
        names = [f"{kind}_{part}{self._suffix}" for kind in ("weight", "bias") for part in self._parts]
        held = (getattr(self.module, name, None) for name in names)
        return [p for p in held if isinstance(p, nn.Parameter)]


class CellMap(GateMap):
    """The same of a cell, which runs one step at a time. Its runs are [1, N, I]."""

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        return computed(module, ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim == 3 else "[samples, inputs]"

    @classmethod
    def _calls_of(cls, module: nn.Module) -> RecurrentCalls:
        return CellCalls(module)


def computed(module: nn.Module, names: list[str]) -> str | None:
    """Returns the reason if the module computes one of these parameters, as under weight_norm or pruning."""
    for name in names:
        if not isinstance(getattr(module, name, None), nn.Parameter | None):
            return f"{class_of(module).__name__} computes its {name} from other parameters"
    return None

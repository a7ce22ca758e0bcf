"""nn.RNN, nn.LSTM, nn.GRU and their cells: a layer for each weight of each direction of each layer of the module.

The fused kernel runs as ever. If a statistic is due, a hook puts copies of the module's results in their place, views
of one tensor, whose gradient is that of all results together; from it a scan backward makes the gradients of the gates.
The steps of a sample are its positions, and all gates together are one layer's outputs: G has the moments between
gates, and A, which they have in common, is kept once.
"""

from functools import cached_property

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ngd_dist.engines import class_of
from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.base import Layer, OnRun
from ngd_dist.layers.recurrent_calls import PARTS, CellCalls, RecurrentCalls
from ngd_dist.layers.recurrent_run import Chain, RecurrentRun

__all__ = ["CellMap", "GateMap"]


class GateMap(Layer):
    """One weight of a recurrent module, with its bias: what it makes of the inputs, the last outputs or the states.

    Its runs are [T, N, I], whatever `batch_first` says.
    """

    module: nn.RNNBase | nn.RNNCellBase

    def __init__(self, name: str, module: nn.Module, calls: RecurrentCalls, chain: Chain, part: str) -> None:
        self._calls, self._chain, self._part = calls, chain, part
        self._suffix = calls.suffix(chain)
        super().__init__(name, module, batch_dim=1)

    @classmethod
    def split_module(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> list[Layer]:
        calls, prefix = cls._calls_of(module), f"{name}." if name else ""
        return [
            cls(f"{prefix}{part}{calls.suffix(chain)}", module, calls, chain, part)
            for chain in calls.chains
            for part in PARTS
            if hasattr(module, f"weight_{part}{calls.suffix(chain)}")
        ]

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
        outputs, inputs = self.shapes[0]
        return LayerShape(self.name, "kronecker", inputs + (self._bias is not None), outputs)

    def keep(self, x: Tensor, output: Tensor) -> RecurrentRun:
        run = self._calls.latest
        assert run is not None
        return run

    def inputs(self, kept: RecurrentRun) -> Tensor:
        steps = kept.steps(self._chain)
        rows = {"ih": lambda: steps.x, "hh": lambda: steps.before_TNP, "hr": lambda: steps.unprojected_TNH}
        rows_BNPI = self._with_ones(rows[self._part]().transpose(0, 1).unsqueeze(0))
        is_step = kept.is_step_TN1
        return rows_BNPI if is_step is None else rows_BNPI * is_step.transpose(0, 1)

    def output_gradients(self, kept: RecurrentRun, g: Tensor) -> Tensor:
        rows_TNO = kept.gradients(g)[self._chain][PARTS.index(self._part)]
        assert rows_TNO is not None
        return rows_TNO.transpose(0, 1).unsqueeze(0)

    def positions(self, kept: RecurrentRun, g_BNPO: Tensor) -> tuple[float, ...]:
        return (kept.positions,)

    def rows(self, kept: RecurrentRun, g: Tensor) -> int:
        return kept.rows

    @classmethod
    def _calls_of(cls, module: nn.Module) -> RecurrentCalls:
        return RecurrentCalls(module)

    @property
    def _weight(self) -> nn.Parameter:
        weight = getattr(self.module, f"weight_{self._part}{self._suffix}")
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def _bias(self) -> nn.Parameter | None:
        bias: nn.Parameter | None = getattr(self.module, f"bias_{self._part}{self._suffix}", None)
        return bias


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

"""nn.MultiheadAttention as two layers: the projections of query, key and value, and that of the output."""

from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ngd_dist.factors.cost import LayerShape
from ngd_dist.layers.base import Layer, OnRun
from ngd_dist.layers.linear_calls import LinearCalls
from ngd_dist.layers.run import of_samples

__all__ = ["InProjection", "OutProjection"]

BLOCKS = 3  # query, key, value: the order of in_proj_weight's rows


class Projection(Layer):
    """The base of both projections: inside the module sequences come first, [P, N, I], even with `batch_first`."""

    module: nn.MultiheadAttention

    def __init__(self, name: str, module: nn.MultiheadAttention, calls: LinearCalls) -> None:
        super().__init__(name, module, batch_dim=1)
        self._calls = calls

    @classmethod
    def split_module(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> list[Layer]:
        assert isinstance(module, nn.MultiheadAttention)
        prefix, calls = f"{name}." if name else "", LinearCalls(module)
        return [kind(f"{prefix}{suffix}", module, calls) for suffix, kind in PROJECTIONS.items()]

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        if module.in_proj_weight is None:
            return "MultiheadAttention with kdim or vdim other than embed_dim"
        return "MultiheadAttention with add_bias_kv" if module.bias_k is not None else None

    def expected_input(self, x: Tensor) -> str | None:
        return None if x.ndim == 3 else "[positions, samples, inputs] (samples first with batch_first)"

    def _rows(self, x_PNI: Tensor) -> Tensor:
        return self._with_ones(x_PNI.movedim(1, 0).unsqueeze(0).to(self.dtype))


class _InRun(NamedTuple):
    """The input [P, N, I] of one linear map, and the blocks that it made: `first` up to but without `end`."""

    x: Tensor
    first: int
    end: int


class InProjection(Projection):
    """q = W_q x_q + b_q, and so k and v: three blocks, each with the A of its own input.

    In self-attention one linear map makes all of them. If query, key and value differ, two or three maps make some
    each; each map is then a run, with rows of 0 in the other blocks.
    """

    _made = (0, BLOCKS)

    @cached_property
    def shape(self) -> LayerShape:
        outputs, inputs = self.shapes[0]
        return LayerShape(self.name, "kronecker", inputs + (self._bias is not None), outputs // BLOCKS, blocks=BLOCKS)

    def watch(self, on_run: OnRun) -> list[RemovableHandle]:
        def on_linear(x: Tensor, weight: Tensor, output: Tensor, samples: int | None) -> None:
            whole = self._weight
            if weight is not whole and weight._base is not whole:
                return
            rows = whole.shape[0] // BLOCKS
            first = int(weight.storage_offset() - whole.storage_offset()) // whole.stride(0) // rows
            # For `keep`, which can't tell the maps of q, k and v apart by their shapes.
            self._made = (first, first + weight.shape[0] // rows)
            on_run(x if samples is not None else x.squeeze(1), output)

        return self._calls.watch(on_linear)

    def keep(self, x: Tensor, output: Tensor) -> _InRun:
        return _InRun(x, *self._made)

    def some_samples(self, kept: _InRun, part: range, samples: int) -> _InRun:
        return kept._replace(x=of_samples(kept.x, part, samples, self.batch_dim))

    def inputs(self, kept: _InRun) -> Tensor:
        return self._placed(self._rows(kept.x).expand(kept.end - kept.first, -1, -1, -1), kept)

    def output_gradients(self, kept: _InRun, g: Tensor) -> Tensor:
        blocks_NPBO = g.movedim(1, 0).unflatten(-1, (kept.end - kept.first, -1))
        return self._placed(blocks_NPBO.movedim(2, 0).to(self.dtype), kept)

    def positions(self, kept: _InRun, g_BNPO: Tensor) -> tuple[float, ...]:
        return tuple(g_BNPO.shape[2] if kept.first <= block < kept.end else 0 for block in range(BLOCKS))

    def _placed(self, rows_BNPD: Tensor, kept: _InRun) -> Tensor:
        if rows_BNPD.shape[0] == BLOCKS:
            return rows_BNPD
        placed = rows_BNPD.new_zeros(BLOCKS, *rows_BNPD.shape[1:])
        placed[kept.first : kept.end] = rows_BNPD
        return placed

    @property
    def _weight(self) -> nn.Parameter:
        return self.module.in_proj_weight

    @property
    def _bias(self) -> nn.Parameter | None:
        return self.module.in_proj_bias


class OutProjection(Projection):
    """Maps the outputs of the heads, side by side, to the module's output."""

    @cached_property
    def shape(self) -> LayerShape:
        outputs, inputs = self.shapes[0]
        return LayerShape(self.name, "kronecker", inputs + (self._bias is not None), outputs)

    def watch(self, on_run: OnRun) -> list[RemovableHandle]:
        def on_linear(x: Tensor, weight: Tensor, output: Tensor, samples: int | None) -> None:
            if weight is self.module.out_proj.weight:  # not a Parameter if the quadratic model replaces it
                # Positions and samples arrive flattened.
                on_run(x if samples is None else x.unflatten(0, (-1, samples)), output)

        return self._calls.watch(on_linear)

    def some_samples(self, kept: Tensor, part: range, samples: int) -> Tensor:
        return of_samples(kept, part, samples, self.batch_dim)

    def some_gradients(self, kept: Tensor, g: Tensor, part: range, samples: int) -> Tensor:
        return of_samples(g.view(*kept.shape[:2], -1), part, samples, self.batch_dim)

    def inputs(self, kept: Tensor) -> Tensor:
        return self._rows(kept)

    def output_gradients(self, kept: Tensor, g: Tensor) -> Tensor:
        return g.view(*kept.shape[:2], -1).movedim(1, 0).unsqueeze(0).to(self.dtype)

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.module.out_proj.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def _bias(self) -> nn.Parameter | None:
        return self.module.out_proj.bias


PROJECTIONS: dict[str, type[Projection]] = {"in_proj": InProjection, "out_proj": OutProjection}

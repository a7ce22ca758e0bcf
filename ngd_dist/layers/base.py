"""The contract of a module kind. Shapes: N samples, P positions, I inputs (+1 with bias), O outputs."""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor, nn

from ngd_dist.cost import LayerShape

__all__ = ["Layer", "Rows", "statistics_dtype"]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which statistics and directions are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layer(ABC):
    """One covered module: its parameters, its shape, and how its tensors become rows."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.parameters: list[nn.Parameter] = [p for p in (self._weight, self._bias) if p is not None]
        self.dtype = statistics_dtype(self._weight.dtype)

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        """Returns why this module can't be described by this kind, or None if it can."""
        return None

    @classmethod
    @abstractmethod
    def expected_input(cls, x: Tensor) -> str | None:
        """Returns the shape that the module's input must have, if this one has another."""

    @property
    @abstractmethod
    def shape(self) -> LayerShape:
        """The shape of the gradient matrix, and the kind of Fisher block."""

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """Returns a_NPI in the statistics' dtype from what the module was given."""

    @abstractmethod
    def output_gradients(self, g: Tensor) -> Tensor:
        """Returns g_NPO in the statistics' dtype from the gradient of what the module returned, unscaled."""

    def join(self, gradients: list[Tensor]) -> Tensor:
        """Returns grad_OI from the gradients of the parameters: the weight flattened to [O, -1], the bias last."""
        rows = gradients[0].shape[0]
        return torch.cat([gradient.reshape(rows, -1) for gradient in gradients], dim=1).to(self.dtype)

    def split(self, direction_OI: Tensor) -> list[Tensor]:
        """Returns one tensor per parameter, in its shape and dtype: the inverse of `join`."""
        widths = [p.numel() // p.shape[0] for p in self.parameters]
        columns = direction_OI.split(widths, dim=1)
        return [c.reshape(p.shape).to(p.dtype) for c, p in zip(columns, self.parameters, strict=True)]

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def _bias(self) -> nn.Parameter | None:
        bias = getattr(self.module, "bias", None)
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    def _with_ones(self, a_NPI: Tensor) -> Tensor:
        """Returns the rows with a last column of 1 if the module has a bias."""
        if self._bias is None:
            return a_NPI
        return torch.cat([a_NPI, a_NPI.new_ones(*a_NPI.shape[:-1], 1)], dim=-1)


class Rows:
    """One micro-batch of one layer: a_NPI and g_NPO, made on first use, so that what no statistic reads costs nothing.

    g is per sample: the gradient of that sample's own loss, with any mean over the batch undone by `scale`.
    """

    def __init__(self, layer: Layer, x: Tensor, g: Tensor, scale: float) -> None:
        self._layer, self._x, self._g, self._scale = layer, x, g, scale

    @cached_property
    def a_NPI(self) -> Tensor:
        return self._layer.inputs(self._x)

    @cached_property
    def g_NPO(self) -> Tensor:
        return self._layer.output_gradients(self._g) * self._scale

"""The steps that torch's fused recurrent kernels hide: gates made again, and their gradients by a scan backward.

Shapes: T steps, N samples, I inputs, H numbers of state, P outputs (H without a projection), O = K H for K gates.
Gates lie side by side in torch's order: i, f, g, o of an LSTM; r, z, n of a GRU.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GRUSteps", "LSTMSteps", "RNNSteps", "ReluSteps", "StepGradients", "Steps", "Weights"]


class Weights(NamedTuple):
    """The weights of one direction of one layer; `hr` [P, H] projects the state of an LSTM."""

    ih: Tensor
    hh: Tensor
    ih_bias: Tensor | None
    hh_bias: Tensor | None
    hr: Tensor | None

    def to(self, dtype: torch.dtype) -> "Weights":
        """Returns the weights in another dtype."""
        return Weights(*(None if w is None else w.to(dtype) for w in self))  # type: ignore[arg-type]


class StepGradients(NamedTuple):
    """The gradients of what each weight makes: `ih` and `hh` [T, N, O] of the gates, `hr` [T, N, P] of the outputs."""

    ih: Tensor
    hh: Tensor
    hr: Tensor | None = None


@dataclass(eq=False)
class Steps(ABC):
    """One direction of one layer, in the order of its own steps, all in one dtype.

    `x` [T, N, I]. `outputs` [T, N, P]: as the fused kernel gave them. `h` [N, P], `c` [N, H]: the initial state, c of
    an LSTM alone. `is_last` [T, N, 1]: whether a step is the last one of a sample; None if all samples have T.
    """

    gates: ClassVar[int]

    x: Tensor
    outputs: Tensor
    h: Tensor
    c: Tensor | None
    weights: Weights
    is_last: Tensor | None = None

    @cached_property
    def before_TNP(self) -> Tensor:
        """The state that each step begins with."""
        return _shifted(self.outputs, self.h)

    @property
    def unprojected_TNH(self) -> Tensor:
        """The states that the projection maps to outputs."""
        raise NotImplementedError

    @abstractmethod
    def gradients(self, g_TNP: Tensor, g_c_NH: Tensor | None) -> StepGradients:
        """Returns the gradients of the steps.

        g_TNP: of the outputs, without the part that comes through later steps. g_c_NH: of the last c of an LSTM.
        """

    @cached_property
    def _by_x(self) -> Tensor:
        return F.linear(self.x, self.weights.ih, self.weights.ih_bias)

    @cached_property
    def _by_h(self) -> Tensor:
        return F.linear(self.before_TNP, self.weights.hh, self.weights.hh_bias)


class RNNSteps(Steps):
    """h = tanh(z) or relu(z), z = W_ih x + b_ih + W_hh h + b_hh."""

    gates = 1

    def gradients(self, g_TNP: Tensor, g_c_NH: Tensor | None) -> StepGradients:
        slopes, hh = self._slopes(), self.weights.hh
        g = torch.empty_like(slopes)
        carried = torch.zeros_like(g_TNP[0])
        for t in reversed(range(len(g))):
            torch.mul(g_TNP[t] + carried, slopes[t], out=g[t])
            carried = g[t] @ hh
        return StepGradients(g, g)

    def _slopes(self) -> Tensor:
        return 1 - self.outputs.square()


class ReluSteps(RNNSteps):
    """The same with relu."""

    def _slopes(self) -> Tensor:
        return (self.outputs > 0).to(self.outputs.dtype)


class GRUSteps(Steps):
    """n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h.

    n's part of h is multiplied by r, and so is its gradient.
    """

    gates = 3

    def gradients(self, g_TNP: Tensor, g_c_NH: Tensor | None) -> StepGradients:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = self._by_x.chunk(3, -1), self._by_h.chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        by_n = (1 - z) * (1 - n * n)
        by_r, by_z = by_n * h_n * r * (1 - r), (self.before_TNP - n) * z * (1 - z)
        slopes_TNKH = torch.stack([by_r, by_z, by_n * r], dim=2)
        g_TNKH, whole_TNH = torch.empty_like(slopes_TNKH), torch.empty_like(z)
        carried, hh = torch.zeros_like(g_TNP[0]), self.weights.hh
        for t in reversed(range(len(z))):
            g_h = torch.add(g_TNP[t], carried, out=whole_TNH[t])
            torch.mul(slopes_TNKH[t], g_h.unsqueeze(1), out=g_TNKH[t])
            carried = torch.addmm(g_h * z[t], g_TNKH[t].flatten(1), hh)
        hidden = g_TNKH.flatten(2)
        return StepGradients(torch.cat([hidden[..., : 2 * z.shape[-1]], by_n * whole_TNH], -1), hidden)


class LSTMSteps(Steps):
    """c' = f c + i g, h' = o tanh(c'), projected by W_hr if there is one."""

    gates = 4

    @property
    def unprojected_TNH(self) -> Tensor:
        return self._gates[-1] * torch.tanh(self._cells)

    def gradients(self, g_TNP: Tensor, g_c_NH: Tensor | None) -> StepGradients:
        assert self.c is not None
        (i, f, g, o), tanh_c = self._gates, torch.tanh(self._cells)
        before = _shifted(self._cells, self.c)
        c_by_z = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], dim=2)  # [T, N, 3, H]
        h_by_o, h_by_c = tanh_c * o * (1 - o), o * (1 - tanh_c * tanh_c)
        g_TNKH, whole_TNP = g.new_empty(*g.shape[:2], 4, g.shape[2]), torch.empty_like(g_TNP)
        last, is_last = torch.zeros_like(self.c) if g_c_NH is None else g_c_NH, self.is_last
        carried_h, carried_c = torch.zeros_like(g_TNP[0]), torch.zeros_like(last) if is_last is not None else last
        hh, hr = self.weights.hh, self.weights.hr
        for t in reversed(range(len(g))):
            if is_last is not None:
                carried_c = torch.where(is_last[t], last, carried_c)
            g_h = torch.add(g_TNP[t], carried_h, out=whole_TNP[t])
            if hr is not None:
                g_h = g_h @ hr
            g_c = torch.addcmul(carried_c, g_h, h_by_c[t])
            torch.mul(c_by_z[t], g_c.unsqueeze(1), out=g_TNKH[t, :, :3])
            torch.mul(h_by_o[t], g_h, out=g_TNKH[t, :, 3])
            carried_c = g_c * f[t]
            carried_h = g_TNKH[t].flatten(1) @ hh
        gates = g_TNKH.flatten(2)
        return StepGradients(gates, gates, None if hr is None else whole_TNP)

    @cached_property
    def _gates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i, f, g, o = (self._by_x + self._by_h).chunk(4, -1)
        return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)

    @cached_property
    def _cells(self) -> Tensor:
        """Returns c of each step, [T, N, H]: of all that the kernel computes it alone is in no output."""
        i, f, g, _ = self._gates
        added, cells, c = i * g, torch.empty_like(f), self.c
        assert c is not None
        for t in range(len(f)):
            c = torch.addcmul(added[t], f[t], c, out=cells[t])
        return cells


def _shifted(states: Tensor, first: Tensor) -> Tensor:
    return torch.cat([first.unsqueeze(0), states[:-1]])

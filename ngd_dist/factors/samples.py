"""The gradients of single samples, which stay on the rank that has the samples. Each block is a matrix U.

U has a column for each sample, and stands for U U^T. With N samples, P positions, I inputs and O outputs a value is

    [B, N, O I]        the gradients themselves, in the order of [O, I]
    [B, N, P, I + O]   their factors, side by side: a gradient is the sum over positions of g a^T

`Implicit` has factors. `Explicit` has gradients; if there is one position, factors, which are then smaller, and cheaper
in every product. Of a form's own `shape`, N and P are 1. If a form `has_draw`, one more number at the end of each row
seeds the draws of its sketches: the seed of the micro-batch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ngd_dist.factors.form import Form, Replicate, is_one

__all__ = ["Explicit", "Implicit", "SampleGradients", "truncated"]

# The numbers of the products of rows that exist at a time: 256 MiB in float32.
MAX_PRODUCTS = 2**26


@dataclass(frozen=True, slots=True)
class SampleGradients(Form, ABC):
    """The columns of U, a value for each sample of a rank. inputs, outputs: I and O."""

    inputs: int
    outputs: int
    has_draw: bool = False

    sample_dims: ClassVar[tuple[int, ...]] = (1,)

    @abstractmethod
    def of_rows(self, a_BNPI: Tensor, g_BNPO: Tensor, replicate: Replicate) -> Tensor:
        """Returns U of these samples over sqrt(N), so that U U^T is a mean."""

    @abstractmethod
    def products(self, value: Tensor, other: Tensor) -> Tensor:
        """Returns U^T V of two values of the same form, [B, N, M]."""

    @abstractmethod
    def along(self, value: Tensor, grad_BOI: Tensor) -> Tensor:
        """Returns U^T grad, [B, N]."""

    @abstractmethod
    def combined(self, value: Tensor, v_BN: Tensor) -> Tensor:
        """Returns U v, [B, O, I]."""

    @abstractmethod
    def sketch(self, q: int) -> "SampleGradients | None":
        """Returns the form of sketches of size q; None if they would keep all entries."""

    def takes_sketch(self, value: Tensor) -> bool:
        """Returns whether products of this value are sketched: not if all of them are cheap."""
        return True

    @abstractmethod
    def drawn(self, sketch: "SampleGradients", generator: torch.Generator) -> Tensor:
        """Returns the places of the entries that one sketch keeps."""

    @abstractmethod
    def sketched(self, value: Tensor, places: Tensor, sketch: "SampleGradients") -> Tensor:
        """Returns a value with the entries at these places, in the form of the sketch."""

    @abstractmethod
    def entries(self, grad_BOI: Tensor, places: Tensor, sketch: "SampleGradients") -> Tensor:
        """Returns a gradient with the entries at these places, as `along` of the sketch takes it."""

    def norm(self, value: Tensor, replicates: int = 1) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self.products(value, value))
        return norm

    def distance(self, value: Tensor, other: Tensor) -> Tensor:
        of_value, cross, of_other = (
            torch.linalg.vector_norm(self.products(x, y)).square()
            for x, y in ((value, value), (value, other), (other, other))
        )
        squared: Tensor = (of_value - 2 * cross + of_other).clamp(min=0)  # rounding may leave less than nothing
        return squared.sqrt()

    def times(self, value: Tensor, factor: float | Tensor) -> Tensor:
        if is_one(factor):
            return value
        scaled = value.clone()
        scaled[..., self._linear_in(value)] *= factor**0.5
        return scaled

    def plus(self, value: Tensor, other: Tensor) -> Tensor:
        """Returns the samples of both, side by side. Positions that one of them lacks are zeros."""
        if value.shape[2:] == other.shape[2:]:
            return torch.cat([value, other], dim=1)
        positions = max(value.shape[2], other.shape[2])
        both = value.new_zeros(len(value), value.shape[1] + other.shape[1], positions, value.shape[-1])
        both[:, : value.shape[1], : value.shape[2]] = value
        both[:, value.shape[1] :, : other.shape[2]] = other
        return both

    def weighted(self, value: Tensor, share: float) -> Tensor:
        return self.times(value, share)

    def averaged(self, last: Tensor, new: Tensor, weight: float, *, reuses: bool) -> Tensor:
        return self.plus(self.times(last, 1 - weight), self.times(new, weight))

    def remembered(self, value: Tensor) -> Tensor:
        return value

    def recalled(self, flat: Tensor) -> Tensor:
        return flat

    def dense(self, value: Tensor) -> Tensor:
        """Returns U U^T of each block, [B, O I, O I]."""
        count = value.shape[1]
        identity = torch.eye(count, dtype=value.dtype, device=value.device).expand(len(value), -1, -1)
        columns = [self.combined(value, identity[:, n]).flatten(1) for n in range(count)]
        U = torch.stack(columns, dim=-1)
        return U @ U.mT

    def draw(self, value: Tensor) -> int:
        """Returns the seed of the draws of a value. Reads a number back."""
        assert self.has_draw
        return int(value.flatten(1)[0, value.shape[-1] - 1].nan_to_num())

    @abstractmethod
    def _linear_in(self, value: Tensor) -> slice:
        """Returns the numbers of the last dimension in which a gradient is linear."""


class Explicit(SampleGradients):
    """A value is [B, N, O I], or [B, N, 1, I + O] if samples have one position."""

    @classmethod
    def of(cls, blocks: int, outputs: int, inputs: int, *, has_draw: bool = False) -> "Explicit":
        """Returns the form of the gradients [O, I] of so many blocks."""
        return cls((blocks, 1, outputs * inputs + has_draw), inputs, outputs, has_draw)

    def of_rows(self, a_BNPI: Tensor, g_BNPO: Tensor, replicate: Replicate) -> Tensor:
        rows = self.factors.of_rows(a_BNPI, g_BNPO, replicate)
        return rows if a_BNPI.shape[2] == 1 else self.formed(rows)

    def plus(self, value: Tensor, other: Tensor) -> Tensor:
        if value.ndim != other.ndim:
            value, other = self.formed(value), self.formed(other)
        return torch.cat([value, other], dim=1)

    def products(self, value: Tensor, other: Tensor) -> Tensor:
        if _are_factors(value) and _are_factors(other):
            return self.factors.products(value, other)
        return self._entries(self.formed(value)) @ self._entries(self.formed(other)).mT

    def along(self, value: Tensor, grad_BOI: Tensor) -> Tensor:
        if _are_factors(value):
            return self.factors.along(value, grad_BOI)
        return (self._entries(value) @ grad_BOI.flatten(1).unsqueeze(-1)).squeeze(-1)

    def combined(self, value: Tensor, v_BN: Tensor) -> Tensor:
        if _are_factors(value):
            return self.factors.combined(value, v_BN)
        return (v_BN.unsqueeze(1) @ self._entries(value)).view(-1, self.outputs, self.inputs)

    def formed(self, value: Tensor) -> Tensor:
        """Returns a value as [B, N, O I]."""
        if not _are_factors(value):
            return value
        gradients = (self.factors.g(value).mT @ self.factors.a(value)).flatten(2)
        return torch.cat([gradients, value[:, :, 0, -1:]], dim=-1) if self.has_draw else gradients

    @property
    def factors(self) -> "Implicit":
        """The form of the factors of these gradients."""
        return Implicit.of(self.shape[0], self.outputs, self.inputs, has_draw=self.has_draw)

    def takes_sketch(self, value: Tensor) -> bool:
        return not _are_factors(value)

    def sketch(self, q: int) -> "Explicit | None":
        return Explicit.of(self.shape[0], 1, q * q) if q * q < self.outputs * self.inputs else None

    def drawn(self, sketch: SampleGradients, generator: torch.Generator) -> Tensor:
        return _some(self.outputs * self.inputs, sketch.inputs, generator)

    def sketched(self, value: Tensor, places: Tensor, sketch: SampleGradients) -> Tensor:
        return value.index_select(-1, places)

    def entries(self, grad_BOI: Tensor, places: Tensor, sketch: SampleGradients) -> Tensor:
        return grad_BOI.flatten(1).index_select(1, places)

    def _entries(self, value: Tensor) -> Tensor:
        return value[..., self._linear_in(value)]

    def _linear_in(self, value: Tensor) -> slice:
        return self.factors._linear_in(value) if _are_factors(value) else slice(self.outputs * self.inputs)


class Implicit(SampleGradients):
    """A value is [B, N, P, I + O]."""

    @classmethod
    def of(cls, blocks: int, outputs: int, inputs: int, *, has_draw: bool = False) -> "Implicit":
        """Returns the form of the factors of the gradients [O, I] of so many blocks."""
        return cls((blocks, 1, 1, inputs + outputs + has_draw), inputs, outputs, has_draw)

    def of_rows(self, a_BNPI: Tensor, g_BNPO: Tensor, replicate: Replicate) -> Tensor:
        samples = a_BNPI.shape[1]
        rows = torch.cat([a_BNPI, g_BNPO * samples**-0.5], dim=-1)
        return _with_draw(rows, replicate) if self.has_draw else rows

    def products(self, value: Tensor, other: Tensor) -> Tensor:
        (B, N, P), (M, Q) = value.shape[:3], other.shape[1:3]
        a, g = (x.flatten(1, 2).mT for x in (self.a(other), self.g(other)))
        chunk = max(1, MAX_PRODUCTS // max(1, B * P * M * Q))
        blocks = [
            ((self.a(some).flatten(1, 2) @ a) * (self.g(some).flatten(1, 2) @ g)).view(B, -1, P, M, Q).sum((2, 4))
            for some in value.split(chunk, dim=1)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1).view(B, N, M)

    def along(self, value: Tensor, grad_BOI: Tensor) -> Tensor:
        of_rows = (self.g(value).flatten(1, 2) @ grad_BOI).view_as(self.a(value))
        return (of_rows * self.a(value)).sum((2, 3))

    def combined(self, value: Tensor, v_BN: Tensor) -> Tensor:
        return (self.g(value) * _per_sample(v_BN)).flatten(1, 2).mT @ self.a(value).flatten(1, 2)

    def combined_of_sums(self, value: Tensor, v_BN: Tensor) -> Tensor:
        """Returns sum_p (sum_n sqrt|v_n| g_np) (sum_n v_n a_np / sum_n sqrt|v_n|)^T in place of `combined`."""
        roots_BN = v_BN.abs().sqrt()
        g_BPO = (self.g(value) * _per_sample(roots_BN)).sum(1)
        shares_BN = v_BN / roots_BN.sum(1, keepdim=True).clamp(min=1e-5)
        return g_BPO.mT @ (self.a(value) * _per_sample(shares_BN)).sum(1)

    def sketch(self, q: int) -> "Implicit | None":
        if q >= max(self.inputs, self.outputs):
            return None
        return Implicit.of(self.shape[0], min(q, self.outputs), min(q, self.inputs))

    def drawn(self, sketch: SampleGradients, generator: torch.Generator) -> Tensor:
        columns = _some(self.inputs, sketch.inputs, generator)
        return torch.cat([columns, _some(self.outputs, sketch.outputs, generator)])

    def sketched(self, value: Tensor, places: Tensor, sketch: SampleGradients) -> Tensor:
        columns, rows = places.split([sketch.inputs, sketch.outputs])
        return value.index_select(-1, torch.cat([columns, rows + self.inputs]))

    def entries(self, grad_BOI: Tensor, places: Tensor, sketch: SampleGradients) -> Tensor:
        columns, rows = places.split([sketch.inputs, sketch.outputs])
        return grad_BOI.index_select(1, rows).index_select(2, columns)

    def a(self, value: Tensor) -> Tensor:
        """Returns the inputs, [B, N, P, I]."""
        return value[..., : self.inputs]

    def g(self, value: Tensor) -> Tensor:
        """Returns the output gradients, [B, N, P, O]."""
        return value[..., self._linear_in(value)]

    def _linear_in(self, value: Tensor) -> slice:
        return slice(self.inputs, self.inputs + self.outputs)


def _are_factors(value: Tensor) -> bool:
    return value.ndim == 4


def truncated(a_BNPI: Tensor, g_BNPO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns a [B, N, R, I] and g [B, N, R, O]: the gradients g a^T with each g cut to its R largest directions.

    g = V S W^T of a sample becomes S W^T, and a becomes V^T a. The samples with NaN or infinity are NaN throughout:
    an SVD would raise, on one rank alone.
    """
    if a_BNPI.shape[2] <= rank:
        return a_BNPI, g_BNPO
    is_bad = ~torch.isfinite(g_BNPO.sum((2, 3), keepdim=True))
    try:
        V, S, Wt = torch.linalg.svd(g_BNPO.masked_fill(is_bad, 0), full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return torch.full_like(a_BNPI[:, :, :1], torch.nan), torch.full_like(g_BNPO[:, :, :1], torch.nan)
    g = (S.unsqueeze(-1) * Wt)[:, :, :rank]
    a = V[..., :rank].mT @ a_BNPI
    return a, g.masked_fill(is_bad, torch.nan)


def _some(width: int, count: int, generator: torch.Generator) -> Tensor:
    """Returns so many of the first numbers, drawn without replacement, in order; all if there are no more."""
    return torch.randperm(width, generator=generator)[:count].sort().values


def _with_draw(rows: Tensor, replicate: Replicate) -> Tensor:
    return torch.cat([rows, rows.new_full((*rows.shape[:-1], 1), replicate.seed)], dim=-1)


def _per_sample(v_BN: Tensor) -> Tensor:
    return v_BN.unsqueeze(-1).unsqueeze(-1)

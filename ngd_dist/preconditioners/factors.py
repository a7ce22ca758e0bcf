"""A and G, the Kronecker factors of a layer's Fisher block, and their eigenbases: what several methods start from."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.config import Sharing
from ngd_dist.cost import LayerShape
from ngd_dist.inversion import Eigen, Ending, Problem, Solution, ToDecompose
from ngd_dist.kronecker import second_moment, square_moment
from ngd_dist.layers.base import Rows
from ngd_dist.preconditioners.base import Cache
from ngd_dist.statistics import StatisticSpec

__all__ = ["Decomposition", "Factors"]


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Eigenvalues of A and G, [B, n], and bases of those that are dense, [B, n, n]: None unless both have theirs."""

    values: Mapping[str, Tensor] | None
    bases: Cache | None
    endings: Mapping[str, Ending]


class Factors:
    """A = (1/N) sum a a^T over samples and positions, G = (1/(N P)) sum g g^T. Sources: [MG15], [GM16] for P > 1.

    With `sharing="reduce"` a is averaged and g summed over positions before, and P is 1. Source: [E23]. A factor wider
    than `max_dense` is kept as its diagonal, and so is the A of one-hot inputs, for which that is exact: its basis is
    the standard one.
    """

    def __init__(self, shape: LayerShape, sharing: Sharing, max_dense: int) -> None:
        B, I, O = shape.blocks, shape.inputs, shape.outputs  # noqa: E741
        dense_a, dense_g = max_dense >= I and not shape.has_one_hot_inputs, max_dense >= O
        self._shape = shape
        self._reduces = sharing == "reduce" and not shape.has_one_hot_inputs
        self.specs = (
            StatisticSpec("A", (B, I, I) if dense_a else (B, I), is_symmetric=dense_a, reads_gradients=False),
            StatisticSpec("G", (B, O, O) if dense_g else (B, O), is_symmetric=dense_g),
        )

    @property
    def bases(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the bases, by factor: the dense ones have one."""
        return {spec.name: spec.shape for spec in self.specs if spec.is_symmetric}

    def inputs(self, rows: Rows) -> Tensor:
        """Returns a_BNPI, with P = 1 where positions are reduced."""
        if not self._reduces:
            return rows.a_BNPI
        return rows.a_BNPI.sum(2, keepdim=True) / rows.positions_B.to(rows.a_BNPI).view(-1, 1, 1, 1)

    def output_gradients(self, rows: Rows) -> Tensor:
        """Returns g_BNPO, with P = 1 where positions are reduced."""
        return rows.g_BNPO.sum(2, keepdim=True) if self._reduces else rows.g_BNPO

    def estimate(self, rows: Rows, due: frozenset[str]) -> dict[str, Tensor]:
        """Returns those of A and G that are due; see `Preconditioner.estimate`."""
        A, G = self.specs
        found: dict[str, Tensor] = {}
        if "A" in due and self._shape.has_one_hot_inputs:
            found["A"] = rows.input_squares_BI / rows.samples
        elif "A" in due and A.is_symmetric and not self._reduces:
            found["A"] = rows.input_moment_BII / rows.samples
        elif "A" in due:
            found["A"] = (second_moment if A.is_symmetric else square_moment)(self.inputs(rows), 1 / rows.samples)
        if "G" in due:
            weight = 1 / rows.samples if self._reduces else 1 / (rows.samples * rows.positions_B)
            found["G"] = (second_moment if G.is_symmetric else square_moment)(self.output_gradients(rows), weight)
        return found

    def to_decompose(self, statistics: Mapping[str, Tensor]) -> dict[str, Problem]:
        """Returns those of A and G that are dense."""
        return {spec.name: ToDecompose(statistics[spec.name]) for spec in self.specs if spec.is_symmetric}

    def decomposition(self, statistics: Mapping[str, Tensor], solutions: Mapping[str, Solution]) -> Decomposition:
        """Returns the eigendecompositions of A and G. A diagonal factor is its own eigenvalues."""
        values: dict[str, Tensor] = {}
        bases: Cache = {}
        endings: dict[str, Ending] = {}
        for spec in self.specs:
            factor = statistics[spec.name]
            if not spec.is_symmetric:
                values[spec.name] = factor
                endings[spec.name] = Ending.OK if bool(torch.isfinite(factor).all()) else Ending.NON_FINITE
                continue
            found = solutions[spec.name]
            assert isinstance(found, Eigen)
            endings[spec.name] = found.ending
            if found.values is not None and found.vectors is not None:
                values[spec.name], bases[spec.name] = found.values, found.vectors
        if any(ending is not Ending.OK for ending in endings.values()):
            return Decomposition(None, None, endings)
        return Decomposition(values, bases, endings)

    def cholesky_flops(self) -> int:
        """Returns the operations of both inverses: n^3 / 3 + 2 n^3 / 3 multiply-adds, two operations each."""
        return 2 * self._cubes()

    def eigen_flops(self) -> int:
        """Returns the operations of both eigendecompositions: some 9 n^3 by QR iterations (Golub and Van Loan, 8.3)."""
        return 9 * self._cubes()

    def product_flops(self) -> int:
        """Returns the operations of one product of the gradient with both factors, or with both bases."""
        entries = self._shape.blocks * self._shape.outputs * self._shape.inputs
        return entries * sum(2 * spec.shape[-1] if spec.is_symmetric else 1 for spec in self.specs)

    def _cubes(self) -> int:
        return sum(spec.shape[0] * spec.shape[-1] ** (3 if spec.is_symmetric else 1) for spec in self.specs)

"""A and G, the Kronecker factors of a layer's Fisher block, and their eigenbases: what several methods start from."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.config import Sharing
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.kronecker import sampled, second_moment, square_moment
from ngd_dist.inversion import Eigen, Ending, Problem, Solution, ToDecompose
from ngd_dist.layers.base import Replicate, Rows
from ngd_dist.preconditioners.base import Cache
from ngd_dist.statistics.statistic import StatisticSpec

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
    the standard one. With `rows` a factor at least twice as wide is kept as so many of its rows: X for X^T X, drawn
    without replacement where there are more, so that X^T X has the factor for its mean.
    """

    def __init__(self, shape: LayerShape, sharing: Sharing, max_dense: int, rows: int | None = None) -> None:
        self._shape = shape
        self._reduces = sharing == "reduce" and not shape.has_one_hot_inputs
        B, I, O = shape.blocks, shape.inputs, shape.outputs  # noqa: E741
        A = (
            StatisticSpec("A", (B, I), reads_gradients=False)
            if shape.has_one_hot_inputs
            else _spec("A", B, I, max_dense, rows, reads_gradients=False)
        )
        self.specs = (A, _spec("G", B, O, max_dense, rows, reads_gradients=True))

    @property
    def bases(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the bases, by factor: the dense ones have one."""
        return {spec.name: spec.shape for spec in self.specs if spec.is_symmetric}

    def inputs(self, rows: Rows) -> Tensor:
        """Returns a_BNPI, with P = 1 where positions are reduced."""
        if not self._reduces:
            return rows.a_BNPI
        positions = rows.positions_B.to(rows.a_BNPI)
        return rows.a_BNPI.sum(2, keepdim=True) / positions.where(positions > 0, 1).view(len(positions), -1, 1, 1)

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
            found["A"] = _moment(A, self.inputs(rows), 1 / rows.samples, rows.replicate)
        if "G" in due:
            weight = 1 / rows.samples if self._reduces else 1 / _positions(rows)
            found["G"] = _moment(G, self.output_gradients(rows), weight, rows.replicate)
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

    def cholesky_flops(self) -> dict[str, int]:
        """Returns the operations of each inverse: n^3 / 3 + 2 n^3 / 3 multiply-adds, two operations each."""
        return {spec.name: 2 * spec.shape[0] * _cube(spec) for spec in self.specs}

    def eigen_flops(self) -> int:
        """Returns the operations of both eigendecompositions: some 9 n^3 by QR iterations (Golub and Van Loan, 8.3)."""
        return 9 * sum(spec.shape[0] * _cube(spec) for spec in self.specs)

    def product_flops(self) -> int:
        """Returns the operations of one product of the gradient with both factors, or with both bases."""
        entries = self._shape.blocks * self._shape.outputs * self._shape.inputs
        return entries * sum(_product_flops(spec) for spec in self.specs)


def _positions(rows: Rows) -> Tensor:
    """Returns the positions of all samples, [B] or [1]. Some of a micro-batch's samples have their share of its own."""
    positions = rows.positions_B
    return (positions if positions.ndim == 1 else rows.mean_positions_B) * rows.samples


def _spec(
    name: str, blocks: int, width: int, max_dense: int, rows: int | None, *, reads_gradients: bool
) -> StatisticSpec:
    if rows is not None and width >= 2 * rows:  # where a product with two thin matrices is the cheaper one
        return StatisticSpec(name, (blocks, rows, width), is_root=True, reads_gradients=reads_gradients)
    if width > max_dense:
        return StatisticSpec(name, (blocks, width), reads_gradients=reads_gradients)
    return StatisticSpec(name, (blocks, width, width), is_symmetric=True, reads_gradients=reads_gradients)


def _moment(spec: StatisticSpec, rows_BNPD: Tensor, scale: float | Tensor, replicate: Replicate) -> Tensor:
    """Returns scale * sum of r r^T in the form of the spec."""
    if not spec.is_root:
        return (second_moment if spec.is_symmetric else square_moment)(rows_BNPD, scale)
    root = scale**0.5 if isinstance(scale, float) else scale.sqrt()
    chosen = sampled(rows_BNPD.flatten(1, 2), spec.shape[1] // replicate.count, replicate.seed)
    return _placed(chosen, root, spec, replicate)


def _placed(rows_BRD: Tensor, scale: float | Tensor, spec: StatisticSpec, replicate: Replicate) -> Tensor:
    """Returns the rows at this replicate's own place among zeros.

    The mean over replicates is then their rows side by side, times what makes it the root of the mean of X^T X.
    """
    placed = rows_BRD.new_zeros(spec.shape)
    first = replicate.index * (spec.shape[1] // replicate.count)
    if isinstance(scale, torch.Tensor):
        scale = scale.to(rows_BRD).view(-1, 1, 1)
    placed[:, first : first + rows_BRD.shape[1]] = rows_BRD * (scale * replicate.count**0.5)
    return placed


def _product_flops(spec: StatisticSpec) -> int:
    if spec.is_root:
        return 4 * spec.shape[1]
    return 2 * spec.shape[-1] if spec.is_symmetric else 1


def _cube(spec: StatisticSpec) -> int:
    """Returns n^3, or what takes its place: half of the operations of the inverse."""
    width = spec.shape[-1]
    if spec.is_root:  # a product of the rows with themselves, and a triangular solve: R^2 n multiply-adds each
        return 2 * spec.shape[1] ** 2 * width
    return width**3 if spec.is_symmetric else width

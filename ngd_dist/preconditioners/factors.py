"""A and G, the Kronecker factors of a layer's Fisher block, and their eigenbases, which several methods share."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ngd_dist.config import Sharing
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.dense import Dense
from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.factors.form import FactorForm, Form
from ngd_dist.factors.kronecker import pi_split
from ngd_dist.factors.root import Root
from ngd_dist.inversion import Ending, Problem, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["Decomposition", "Factors", "factor_form", "factor_forms"]


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Eigenvalues of A and G, [B, n], and bases of those that are dense, [B, n, n]: None unless both have theirs."""

    values: Mapping[str, Tensor] | None
    bases: Cache | None
    endings: Mapping[str, Ending]


class Factors:
    """A = (1/N) sum a a^T over samples and positions, G = (1/(N P)) sum g g^T. Sources: [MG15], [GM16] for P > 1.

    With `sharing="reduce"` a is averaged and g summed over positions before, and P is 1. Source: [E23]. `forms`: those
    of A and G; the A of one-hot inputs must be diagonal, which is exact: see `factor_forms`.
    """

    def __init__(self, shape: LayerShape, sharing: Sharing, forms: Mapping[str, FactorForm]) -> None:
        self.forms = forms
        self._shape = shape
        self._reduces = sharing == "reduce" and not shape.has_one_hot_inputs
        self.specs = (
            StatisticSpec("A", forms["A"], reads_gradients=False),
            StatisticSpec("G", forms["G"], reads_gradients=True, per_position=not self._reduces),
        )

    @property
    def gradient(self) -> tuple[int, int, int]:
        """The shape of grad_BOI."""
        return self._shape.gradient

    @property
    def sums_positions(self) -> bool:
        """Whether rows are summed over positions before their moments are taken."""
        return self._reduces

    @property
    def bases(self) -> dict[str, Form]:
        """The forms of the bases, by factor; a factor whose basis is the standard one has none."""
        return {name: Form(form.basis) for name, form in self.forms.items() if form.basis}

    def inputs(self, batch: LayerBatch) -> Tensor:
        """Returns a_BNPI, with P = 1 if positions are reduced."""
        if not self._reduces:
            return batch.a_BNPI
        positions = batch.positions_B.to(batch.a_BNPI)
        return batch.a_BNPI.sum(2, keepdim=True) / positions.where(positions > 0, 1).view(len(positions), -1, 1, 1)

    def output_gradients(self, batch: LayerBatch) -> Tensor:
        """Returns g_BNPO, with P = 1 if positions are reduced."""
        return batch.g_BNPO.sum(2, keepdim=True) if self._reduces else batch.g_BNPO

    def estimate(self, batch: LayerBatch, due: frozenset[str]) -> dict[str, Tensor]:
        """Returns those of A and G that are due; see `Preconditioner.estimate`."""
        statistics: dict[str, Tensor] = {}
        if "A" in due:
            statistics["A"] = self._input_moment(batch)
        if "G" in due:
            weight = 1 / batch.samples if self._reduces else 1 / (batch.mean_positions_B * batch.samples)
            statistics["G"] = self.forms["G"].moment(self.output_gradients(batch), weight, batch.replicate)
        return statistics

    def damping(self, statistics: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Returns the multiple of I to add to each factor for this damping of their product, [B]: see `pi_split`."""
        mean_a, mean_g = (self.forms[name].mean_eigenvalue(statistics[name]) for name in ("A", "G"))
        damping_a, damping_g = pi_split(mean_a, mean_g, damping)
        return {"A": damping_a, "G": damping_g}

    def precondition(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        """Returns G^-1 grad A^-1, [B, O, I]: (G (x) A)^-1 vec(grad) for a row-major gradient. Source: [MG15].

        cache: the inverses of both. If a form `lacks_damping`, its inverse leaves out 1 / damping.
        """
        return self.forms["G"].left(cache["G"], self.forms["A"].right(grad_BOI, cache["A"]))

    def to_decompose(self, statistics: Mapping[str, Tensor]) -> dict[str, Problem]:
        """Returns those of A and G that have a basis other than the standard one."""
        problems = {name: form.to_decompose(statistics[name]) for name, form in self.forms.items()}
        return {name: problem for name, problem in problems.items() if problem is not None}

    def decomposition(self, statistics: Mapping[str, Tensor], solutions: Mapping[str, Solution]) -> Decomposition:
        """Returns the eigendecompositions of A and G."""
        values: dict[str, Tensor] = {}
        bases: Cache = {}
        endings: dict[str, Ending] = {}
        for name, form in self.forms.items():
            eigen = form.eigen(statistics[name], solutions.get(name))
            endings[name] = eigen.ending
            if eigen.values is not None:
                values[name] = eigen.values
            if eigen.vectors is not None:
                bases[name] = eigen.vectors
        if any(ending is not Ending.OK for ending in endings.values()):
            return Decomposition(None, None, endings)
        return Decomposition(values, bases, endings)

    def inverse_flops(self) -> int:
        """Returns the operations of both inverses."""
        return sum(form.inverse_flops for form in self.forms.values())

    def eigen_flops(self) -> int:
        """Returns the operations of both eigendecompositions.

        Some 9 n^3 by QR iterations (Golub and Van Loan, 8.3), where a dense inverse takes 2 n^3.
        """
        return 9 * self.inverse_flops() // 2

    def product_flops(self) -> int:
        """Returns the operations of one product of the gradient with both factors, or with both bases."""
        entries = self._shape.blocks * self._shape.outputs * self._shape.inputs
        return entries * sum(form.product_flops for form in self.forms.values())

    def _input_moment(self, batch: LayerBatch) -> Tensor:
        if self._shape.has_one_hot_inputs:
            return batch.input_squares_BI / batch.samples
        if self._reduces:
            return self.forms["A"].moment(self.inputs(batch), 1 / batch.samples, batch.replicate)
        return self.forms["A"].input_moment(batch)


def factor_form(
    blocks: int, width: int, max_dense: int, rows: int | None = None, whole: type[Dense] = Dense
) -> FactorForm:
    """Returns the form of a factor of this width: dense, or its diagonal if it is wider than `max_dense`.

    With `rows` a factor at least twice as wide is kept as that many of its rows X, for X^T X. If there are more, they
    are drawn without replacement, so that the mean of X^T X is the factor. whole: the form of a dense one.
    """
    if rows is not None and width >= 2 * rows:  # then a product with two thin matrices is cheaper
        return Root((blocks, rows, width))
    return Diagonal((blocks, width)) if width > max_dense else whole((blocks, width, width))


def factor_forms(
    shape: LayerShape, max_dense: int, rows: int | None = None, whole: type[Dense] = Dense
) -> dict[str, FactorForm]:
    """Returns the forms of A and G. The A of one-hot inputs is exactly diagonal: its basis is the standard one."""
    B, I, O = shape.blocks, shape.inputs, shape.outputs  # noqa: E741
    A = Diagonal((B, I)) if shape.has_one_hot_inputs else factor_form(B, I, max_dense, rows, whole)
    return {"A": A, "G": factor_form(B, O, max_dense, rows, whole)}

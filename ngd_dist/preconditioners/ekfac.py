"""EKFAC: the Fisher block's diagonal in the eigenbasis of K-FAC's factors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ngd_dist.config import EKFAC as EKFACConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import Entrywise, Form
from ngd_dist.factors.kronecker import from_basis, outer, to_basis
from ngd_dist.inversion import Ending, Problem, Solution
from ngd_dist.layers.batch import LayerBatch
from ngd_dist.preconditioners.base import Cache, Preconditioner, Refreshed
from ngd_dist.preconditioners.factors import Factors, factor_forms
from ngd_dist.statistics.statistic import StatisticSpec

__all__ = ["EKFAC"]

# Entries of per-sample gradients that exist at a time: 64 MiB in float32. The gradient of one sample is always whole.
MAX_ENTRIES = 2**24


class EKFAC(Preconditioner):
    """S = (1/N) sum over samples of (U_G^T grad U_A)^2, entry by entry, with the grad of the sample. Source: [GLB18].

    No diagonal in this basis is closer to the Fisher block in Frobenius norm. A sample's gradient is summed over its
    positions before it is squared. In the step that makes a new basis, S has not been measured in it yet: the products
    of the factors' eigenvalues take its place, which is K-FAC with exact damping. If eigenvalues coincide, their
    eigenvectors are any basis of the eigenspace, and S depends on that basis.
    """

    def __init__(self, shape: LayerShape, config: EKFACConfig, max_dense: int) -> None:
        super().__init__(shape)
        self._factors = Factors(shape, config.sharing, factor_forms(shape, max_dense))
        self.statistics = (*self._factors.specs, StatisticSpec("S", Entrywise(shape.gradient), in_basis=True))
        self.entries = {**self._factors.bases, "S": Form(shape.gradient), "damping": Form(())}
        self.shared = tuple(self._factors.bases)

    def estimate(self, batch: LayerBatch, due: frozenset[str], shared: Cache) -> dict[str, Tensor]:
        statistics = self._factors.estimate(batch, due)
        if "S" in due and all(name in shared for name in self.shared):
            a_BNPI, g_BNPO = self._factors.inputs(batch), self._factors.output_gradients(batch)
            statistics["S"] = _squares_in_basis(a_BNPI, g_BNPO, shared.get("A"), shared.get("G")) / batch.samples
        return statistics

    def problems(
        self, statistics: Mapping[str, Tensor], fresh: frozenset[str], damping: float, old: Cache | None
    ) -> dict[str, Problem]:
        """Returns the factors if one is new, else nothing. An earlier S belongs to the old basis."""
        return self._factors.to_decompose(statistics) if _is_new_basis(fresh, old) else {}

    def error(self, name: str, statistics: Mapping[str, Tensor], damping: float, old: Cache) -> Tensor | None:
        """Returns ||B - diag B||_F / ||B||_F of a factor in its old basis, B = U^T X U: 0 for a diagonal form.

        One product, since U leaves the norm as it is.
        """
        if name == "S":
            return None
        X = statistics[name]
        if name not in self.shared:
            return X.new_zeros(())
        X = self._factors.forms[name].dense(X)
        whole, diagonal = X.square().sum((-2, -1)), (old[name] * (X @ old[name])).sum(-2).square().sum(-1)
        rest = ((whole - diagonal).clamp(min=0) / whole.where(whole > 0, 1)).sqrt()
        return rest.amax()

    def refresh(
        self,
        statistics: Mapping[str, Tensor],
        fresh: frozenset[str],
        damping: float,
        old: Cache | None,
        solutions: Mapping[str, Solution],
    ) -> Refreshed:
        endings: Mapping[str, Ending]
        if old is None or _is_new_basis(fresh, old):
            eigen = self._factors.decomposition(statistics, solutions)
            endings = eigen.endings
            if eigen.values is None or eigen.bases is None:
                return Refreshed(old, endings)
            bases, S = eigen.bases, outer(eigen.values["G"], eigen.values["A"])
        else:
            bases, S = {name: old[name] for name in self.shared}, statistics.get("S", old["S"])
            endings = {"S": Ending.OK if bool(torch.isfinite(S).all()) else Ending.NON_FINITE}
            if endings["S"] is not Ending.OK:
                return Refreshed(old, endings)
        return Refreshed({**bases, "S": S, "damping": S.new_tensor(damping)}, endings)

    def apply(self, cache: Cache, grad_BOI: Tensor) -> Tensor:
        A, G = cache.get("A"), cache.get("G")
        return from_basis(A, G, to_basis(A, G, grad_BOI) / (cache["S"] + cache["damping"]))

    def refresh_flops(self) -> int:
        return self._factors.eigen_flops()

    def apply_flops(self) -> int:
        return 2 * self._factors.product_flops()


def _is_new_basis(fresh: frozenset[str], old: Cache | None) -> bool:
    return old is None or bool(fresh - {"S"})


def _squares_in_basis(a_BNPI: Tensor, g_BNPO: Tensor, A_basis: Tensor | None, G_basis: Tensor | None) -> Tensor:
    """Returns the sum over n of (U_G^T (sum over p of g a^T) U_A)^2, [B, O, I]."""
    B, _, P, I = a_BNPI.shape  # noqa: E741
    O = g_BNPO.shape[-1]  # noqa: E741
    if P == 1:  # the square of a product is the product of the squares: no sample's gradient is formed
        a_BNI, g_BNO = _turned(a_BNPI, A_basis).squeeze(2), _turned(g_BNPO, G_basis).squeeze(2)
        return g_BNO.square().mT @ a_BNI.square()
    # Each basis is applied to the side with fewer rows: the P of a sample, or those of its gradient.
    turns_a, turns_g = P <= O, P <= I
    total = a_BNPI.new_zeros(B, O, I)
    chunk = max(1, MAX_ENTRIES // total.numel())
    for a_BnPI, g_BnPO in zip(a_BNPI.split(chunk, 1), g_BNPO.split(chunk, 1), strict=True):
        a, g = _turned(a_BnPI, A_basis if turns_a else None), _turned(g_BnPO, G_basis if turns_g else None)
        entries_BnOI = _turned(g.mT @ a, None if turns_a else A_basis)
        entries_BnIO = _turned(entries_BnOI.mT, None if turns_g else G_basis)
        total += entries_BnIO.square().sum(1).mT
    return total


def _turned(rows_BNKD: Tensor, basis_BDD: Tensor | None) -> Tensor:
    """Returns every row times the basis of its block."""
    if basis_BDD is None:
        return rows_BNKD
    return (rows_BNKD.flatten(1, 2) @ basis_BDD).view(rows_BNKD.shape)

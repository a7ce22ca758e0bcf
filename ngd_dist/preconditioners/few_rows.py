"""The inverse of a factor as K-FAC's cache has it: of the whole matrix, or of the few rows that it is made of.

The direction of a gradient sum_r g_r a_r^T, with rows g [B, R, O] and a [B, R, I], has two ways:

    G^-1 (grad A^-1)            from the gradient: 2 n operations per entry for each dense factor, 4 R for one of R rows
    (g G^-1)^T (a A^-1)         from its rows: the same per number of a row, and a product of O I R

If A and G are made of these very rows, the second is g^T (Kg + dg)^-1 (Ka + da)^-1 a with both Gram matrices K.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ngd_dist.factors.form import FactorForm
from ngd_dist.factors.gram import Gram, RowInverse
from ngd_dist.preconditioners.base import Cache

__all__ = ["FactorInverse", "from_rows", "kept_rows", "loaded", "saved", "with_rows"]

# The entries of a cache beside the inverse of a factor that is kept as rows.
ROWS, DAMPING = " rows", " damping"


@dataclass(frozen=True, slots=True)
class FactorInverse:
    """(X + d I)^-1 of one factor. `parts`: those of a factor that is kept as rows, of which `entry` is the inverse."""

    form: FactorForm
    entry: Tensor
    parts: RowInverse | None

    @classmethod
    def of(cls, name: str, form: FactorForm, cache: Cache) -> "FactorInverse":
        """Returns the inverse of this factor from a cache that has one."""
        rows, entry = cache.get(name + ROWS), cache[name]
        return cls(form, entry, None if rows is None else RowInverse(rows, entry, cache[name + DAMPING]))

    def left(self, matrix_BnI: Tensor) -> Tensor:
        """Returns inverse M, [B, n, I], a new tensor."""
        return self.form.left(self.entry, matrix_BnI) if self.parts is None else self.parts.left(matrix_BnI)

    def right(self, matrix_BOn: Tensor) -> Tensor:
        """Returns M inverse, [B, O, n], a new tensor."""
        return self.form.right(matrix_BOn, self.entry) if self.parts is None else self.parts.right(matrix_BOn)

    def of_rows(self, rows_BRn: Tensor) -> tuple[Tensor, Tensor | float]:
        """Returns a new tensor [B, R, n] and its divisor: rows inverse as their quotient."""
        if (mixing := self.mixing(rows_BRn)) is not None:
            return mixing @ rows_BRn, 1.0
        if self.parts is not None:
            return self.parts.undivided(rows_BRn), self.parts.divisor
        return self.form.right(rows_BRn, self.entry), 1.0

    def mixing(self, rows_BRn: Tensor) -> Tensor | None:
        """Returns the [B, R, R] with which rows inverse = [B, R, R] rows; None unless it is made of these rows."""
        return None if self.parts is None or rows_BRn is not self.parts.rows else self.parts.inverse

    @property
    def product_flops(self) -> int:
        """The operations of `left` or `right` for each entry of M."""
        return self.form.product_flops if self.parts is None else 4 * self.parts.rows.shape[1]


def from_rows(A: FactorInverse, G: FactorInverse, a_BRI: Tensor, g_BRO: Tensor, share: float) -> Tensor:
    """Returns share (g G^-1)^T (a A^-1), [B, O, I]: the direction of the gradient share sum_r g_r a_r^T."""
    of_a, of_g = A.mixing(a_BRI), G.mixing(g_BRO)
    if of_a is not None and of_g is not None:
        mixing = (of_g @ of_a).mul_(share)
        if g_BRO.shape[-1] < a_BRI.shape[-1]:
            return (g_BRO.mT @ mixing) @ a_BRI
        return g_BRO.mT @ (mixing @ a_BRI)
    (a_BRI, divisor_a), (g_BRO, divisor_g) = A.of_rows(a_BRI), G.of_rows(g_BRO)
    return g_BRO.mul_(share / (divisor_a * divisor_g)).mT @ a_BRI


def kept_rows(cache: Cache) -> dict[str, Tensor]:
    """Returns the rows of each factor that is kept as rows, [B, R, n], by its name."""
    return {entry.removesuffix(ROWS): rows for entry, rows in cache.items() if entry.endswith(ROWS)}


def is_rows(form: FactorForm, value: Tensor) -> bool:
    """Returns whether the value of a factor is rows that stand for the matrix."""
    return isinstance(form, Gram) and form.is_rows(value)


def with_rows(
    cache: Cache,
    fresh: Collection[str],
    forms: Mapping[str, FactorForm],
    statistics: Mapping[str, Tensor],
    split: Callable[[], Mapping[str, Tensor]],
) -> Cache:
    """Returns the cache with the rows of the factors beside their inverses, if those are `fresh`.

    split: returns the damping of each factor, [B].
    """
    beside = {name + part for name in fresh for part in (ROWS, DAMPING)}
    cache = {entry: value for entry, value in cache.items() if entry not in beside}
    rows = {name: value for name in fresh if is_rows(forms[name], value := statistics[name])}
    if rows:
        damping = split()
        for name, value in rows.items():
            cache |= {name + ROWS: value, name + DAMPING: damping[name]}
    return cache


def saved(cache: Cache, forms: Mapping[str, FactorForm]) -> Cache:
    """Returns the cache with one entry per factor, of the shape of a whole inverse."""
    entries = {entry: value for entry, value in cache.items() if not entry.endswith((ROWS, DAMPING))}
    for name in kept_rows(cache):
        form = forms[name]
        assert isinstance(form, Gram)
        entries[name] = form.pack_inverse(RowInverse(cache[name + ROWS], cache[name], cache[name + DAMPING]))
    return entries


def loaded(entries: Cache, forms: Mapping[str, FactorForm], *, keeps_rows: bool) -> Cache:
    """Returns the cache that was saved; with whole inverses in place of rows unless it `keeps_rows`."""
    cache = dict(entries)
    for name, form in forms.items():
        parts = form.unpack_inverse(entries[name]) if isinstance(form, Gram) else None
        if parts is not None and keeps_rows:
            cache |= {name: parts.inverse, name + ROWS: parts.rows, name + DAMPING: parts.damping}
        elif parts is not None:
            cache[name] = parts.dense()
    return cache

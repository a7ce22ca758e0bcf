"""How many iterations of Newton-Schulz one Cholesky inversion is worth, as measured on this device.

`python -m benchmarks.crossover` writes tables/<device>.json, beside this file. On a device without such a
table, or beyond the sizes in it, Cholesky is taken.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources

import torch

from ngd_dist.config import AutomaticInversion, CholeskyInversion, InversionChoice
from ngd_dist.inversion.ladder import Terms
from ngd_dist.inversion.problem import Method

__all__ = ["Worth", "device_name", "file_name", "table_for", "terms_for", "worth_at"]


@dataclass(frozen=True, slots=True)
class Worth:
    """Of `batch` matrices of n rows: the iterations that cost as much as Cholesky, rounded down, with this arithmetic.

    0 where a single one costs more.
    """

    n: int
    batch: int
    iterations: int
    update_dtype: str
    residual: str


def terms_for(choice: InversionChoice, n: int, batch: int, dtype: torch.dtype, device: torch.device) -> Terms:
    """Returns what may be tried on `batch` factors of n rows under this choice. A float64 factor stays float64."""
    direct: tuple[Method, ...] = (Method.CHOLESKY, Method.CHOLESKY_FLOAT64)
    if dtype == torch.float64:
        direct = (Method.CHOLESKY,)
    elif isinstance(choice, CholeskyInversion) and choice.dtype == "float64":
        direct = (Method.CHOLESKY_FLOAT64,)
    if isinstance(choice, CholeskyInversion):
        return Terms(direct)
    if not isinstance(choice, AutomaticInversion):
        return Terms(direct, choice.max_iterations, choice.update_dtype, choice.residual, choice.tolerance)
    worth = worth_at(table_for(device_name(device)), n, batch) if dtype == torch.float32 else None
    return Terms(direct, worth.iterations, worth.update_dtype, worth.residual) if worth else Terms(direct)


def worth_at(table: Sequence[Worth], n: int, batch: int) -> Worth | None:
    """Returns the less favourable of the two measured sizes around n, at the largest measured batch that is not above.

    None outside of what was measured.
    """
    sizes = sorted({row.n for row in table})
    below, above = bisect_right(sizes, n) - 1, bisect_left(sizes, n)
    if below < 0 or above == len(sizes):
        return None
    found = [_at(table, sizes[below], batch), _at(table, sizes[above], batch)]
    rows = [row for row in found if row is not None]
    return min(rows, key=lambda row: row.iterations) if len(rows) == 2 else None


def device_name(device: torch.device) -> str:
    """Returns what a table is named by: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(device: str) -> str:
    """Returns the table's file: the device's name in lower case, with underscores."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


@lru_cache
def table_for(device: str) -> tuple[Worth, ...]:
    """Returns the rows that were measured on the device; none where it was not."""
    file = resources.files("ngd_dist.inversion").joinpath("tables", file_name(device))
    if not file.is_file():
        return ()
    names = [field.name for field in fields(Worth)]  # the times that they come from are there to be read by people
    return tuple(Worth(**{name: row[name] for name in names}) for row in json.loads(file.read_text())["rows"])


def _at(table: Sequence[Worth], n: int, batch: int) -> Worth | None:
    rows = [row for row in table if row.n == n and row.batch <= batch]
    return max(rows, key=lambda row: row.batch, default=None)

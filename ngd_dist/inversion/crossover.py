"""The number of Newton-Schulz iterations that cost as much as one Cholesky inversion, measured on this device.

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
from ngd_dist.inversion.ladder import Policy
from ngd_dist.inversion.problem import Method

__all__ = ["Crossover", "crossover_at", "device_name", "file_name", "policy_for", "table_for"]


@dataclass(frozen=True, slots=True)
class Crossover:
    """The iterations that cost as much as Cholesky on `batch` matrices of n rows, rounded down, with this arithmetic.

    0 if a single one costs more.
    """

    n: int
    batch: int
    iterations: int
    update_dtype: str
    residual: str


def policy_for(choice: InversionChoice, n: int, batch: int, dtype: torch.dtype, device: torch.device) -> Policy:
    """Returns the methods for `batch` factors of n rows under this choice. A float64 factor stays float64."""
    direct: tuple[Method, ...] = (Method.CHOLESKY, Method.CHOLESKY_FLOAT64)
    if dtype == torch.float64:
        direct = (Method.CHOLESKY,)
    elif isinstance(choice, CholeskyInversion) and choice.dtype == "float64":
        direct = (Method.CHOLESKY_FLOAT64,)
    if isinstance(choice, CholeskyInversion):
        return Policy(direct)
    if not isinstance(choice, AutomaticInversion):
        return Policy(direct, choice.max_iterations, choice.update_dtype, choice.residual, choice.tolerance)
    measured = crossover_at(table_for(device_name(device)), n, batch) if dtype == torch.float32 else None
    return Policy(direct, measured.iterations, measured.update_dtype, measured.residual) if measured else Policy(direct)


def crossover_at(table: Sequence[Crossover], n: int, batch: int) -> Crossover | None:
    """Returns the less favourable of the two measured sizes around n, at the largest measured batch that is not above.

    None outside of the measured sizes.
    """
    sizes = sorted({row.n for row in table})
    below, above = bisect_right(sizes, n) - 1, bisect_left(sizes, n)
    if below < 0 or above == len(sizes):
        return None
    rows = [row for i in (below, above) if (row := _at(table, sizes[i], batch)) is not None]
    return min(rows, key=lambda row: row.iterations) if len(rows) == 2 else None


def device_name(device: torch.device) -> str:
    """Returns the name of a device's table: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(device: str) -> str:
    """Returns the table's file: the device's name in lower case, with underscores."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


@lru_cache
def table_for(device: str) -> tuple[Crossover, ...]:
    """Returns the rows that were measured on the device; none if it was not measured."""
    file = resources.files("ngd_dist.inversion").joinpath("tables", file_name(device))
    if not file.is_file():
        return ()
    names = [field.name for field in fields(Crossover)]  # the file also has the measured times, for people
    return tuple(Crossover(**{name: row[name] for name in names}) for row in json.loads(file.read_text())["rows"])


def _at(table: Sequence[Crossover], n: int, batch: int) -> Crossover | None:
    rows = [row for row in table if row.n == n and row.batch <= batch]
    return max(rows, key=lambda row: row.batch, default=None)

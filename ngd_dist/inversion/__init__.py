"""Inverses and eigenbases of factors. How it went is part of the result; nothing is printed or raised.

Start at `solve`, which gets all factors of a step at once; `ladder` decides which method is tried, and which after it.
"""

from ngd_dist.inversion.direct import eigen, error_of, invert, invert_diagonal, invert_rows
from ngd_dist.inversion.problem import (
    MAX_RESIDUAL,
    Eigen,
    Ending,
    Inverse,
    Method,
    Problem,
    Solution,
    ToDecompose,
    ToInvert,
    ToInvertRows,
)
from ngd_dist.inversion.solver import solve

__all__ = [
    "MAX_RESIDUAL",
    "Eigen",
    "Ending",
    "Inverse",
    "Method",
    "Problem",
    "Solution",
    "ToDecompose",
    "ToInvert",
    "ToInvertRows",
    "eigen",
    "error_of",
    "invert",
    "invert_diagonal",
    "invert_rows",
    "solve",
]

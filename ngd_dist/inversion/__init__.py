"""Inverses and eigenbases of factors. The ending is a part of the result; nothing is printed or raised.

Start at `solve`, which gets all factors of a step at once; `ladder` decides the order in which methods are tried.
"""

from ngd_dist.inversion.direct import (
    eigen,
    error_of,
    invert,
    invert_diagonal,
    invert_rows,
    reciprocal,
    woodbury,
)
from ngd_dist.inversion.problem import (
    MAX_RESIDUAL,
    Direct,
    Eigen,
    Ending,
    Inverse,
    Method,
    Problem,
    RawInverse,
    Solution,
    ToDecompose,
    ToInvert,
)
from ngd_dist.inversion.solver import solve

__all__ = [
    "MAX_RESIDUAL",
    "Direct",
    "Eigen",
    "Ending",
    "Inverse",
    "Method",
    "Problem",
    "RawInverse",
    "Solution",
    "ToDecompose",
    "ToInvert",
    "eigen",
    "error_of",
    "invert",
    "invert_diagonal",
    "invert_rows",
    "reciprocal",
    "solve",
    "woodbury",
]

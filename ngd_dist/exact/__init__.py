"""Natural gradients of models that are small enough to be treated exactly: no factors, one solve for all weights.

`EnergyNGD` trains networks on the residuals of equations, `VariationalNGD` the distributions of Gaussian processes.
"""

from ngd_dist.exact.energy import EnergyNGD
from ngd_dist.exact.jacobian import Field, Residual
from ngd_dist.exact.variational import VariationalNGD, gpytorch_pairs

__all__ = ["EnergyNGD", "Field", "Residual", "VariationalNGD", "gpytorch_pairs"]

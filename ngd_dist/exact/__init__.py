"""Natural gradients of models small enough to be treated exactly: no factors, one solve for all weights.

Start at `energy.EnergyNGD`.
"""

from ngd_dist.exact.energy import EnergyNGD
from ngd_dist.exact.jacobian import Field, Residual

__all__ = ["EnergyNGD", "Field", "Residual"]

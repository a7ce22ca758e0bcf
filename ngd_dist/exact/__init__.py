"""Natural gradients of models that are small enough to be treated exactly: no factors, one solve for all weights.

`EnergyNGD` trains networks on the residuals of equations or an `Energy`, `StateSpaceNGD` parameters by the state that
they cause, in a metric of the state; `VariationalNGD` steps the distributions of Gaussian processes.
`logistic.DuallyFlatClassifier` is an estimator of scikit-learn's kind, and needs it.
"""

from ngd_dist.exact.energy import EnergyNGD
from ngd_dist.exact.jacobian import Energy, Field, Residual
from ngd_dist.exact.state_space import StateSpaceNGD
from ngd_dist.exact.variational import VariationalNGD, gpytorch_pairs

__all__ = ["Energy", "EnergyNGD", "Field", "Residual", "StateSpaceNGD", "VariationalNGD", "gpytorch_pairs"]

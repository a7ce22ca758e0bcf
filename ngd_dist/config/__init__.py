"""All mathematical settings of the optimizer, as frozen pydantic models without torch. Start at `ngd.NGDConfig`.

Each choice is its own class, told apart by ``kind``, and answers for itself: its defaults, and the settings that it
refuses. An unknown field is an error, never ignored.
"""

from ngd_dist.config.choice import Choice, Settings
from ngd_dist.config.damping import (
    ConstantDamping,
    DampingChoice,
    ExponentialDamping,
    LevenbergMarquardt,
    PolynomialDamping,
)
from ngd_dist.config.distribution import AllReduce, OwnerSharded, Single, StrategyChoice
from ngd_dist.config.exact import EnergyNGDConfig, GridSearch
from ngd_dist.config.fisher import (
    Bernoulli,
    Categorical,
    Empirical,
    Exact,
    FisherChoice,
    Gaussian,
    LikelihoodChoice,
    MonteCarlo,
    Positions,
)
from ngd_dist.config.inversion import AutomaticInversion, CholeskyInversion, InversionChoice, NewtonSchulzInversion
from ngd_dist.config.methods import (
    DEFAULT_THRESHOLD,
    EKFAC,
    KFAC,
    LNGD,
    PRECONDITIONERS,
    SENG,
    SINGD,
    TKFAC,
    Eva,
    PreconditionerChoice,
    PreconditionerConfig,
    Sharing,
)
from ngd_dist.config.ngd import NGDConfig
from ngd_dist.config.recipes import RECIPES, Family
from ngd_dist.config.staleness import AdaptiveInterval, FixedInterval, StalenessChoice, Thresholds
from ngd_dist.config.step import (
    AdamWFallback,
    ClipChoice,
    FallbackChoice,
    GivenLength,
    KLClip,
    LayerWise,
    LengthChoice,
    NormClip,
    QuadraticModel,
    SGDFallback,
)
from ngd_dist.config.transforms import SNGDConfig

__all__ = [
    "DEFAULT_THRESHOLD",
    "EKFAC",
    "KFAC",
    "LNGD",
    "PRECONDITIONERS",
    "RECIPES",
    "SENG",
    "SINGD",
    "TKFAC",
    "AdamWFallback",
    "AdaptiveInterval",
    "AllReduce",
    "AutomaticInversion",
    "Bernoulli",
    "Categorical",
    "Choice",
    "CholeskyInversion",
    "ClipChoice",
    "ConstantDamping",
    "DampingChoice",
    "Empirical",
    "EnergyNGDConfig",
    "Eva",
    "Exact",
    "ExponentialDamping",
    "FallbackChoice",
    "Family",
    "FisherChoice",
    "FixedInterval",
    "Gaussian",
    "GivenLength",
    "GridSearch",
    "InversionChoice",
    "KLClip",
    "LayerWise",
    "LengthChoice",
    "LevenbergMarquardt",
    "LikelihoodChoice",
    "MonteCarlo",
    "NGDConfig",
    "NewtonSchulzInversion",
    "NormClip",
    "OwnerSharded",
    "PolynomialDamping",
    "Positions",
    "PreconditionerChoice",
    "PreconditionerConfig",
    "QuadraticModel",
    "SGDFallback",
    "SNGDConfig",
    "Settings",
    "Sharing",
    "Single",
    "StalenessChoice",
    "StrategyChoice",
    "Thresholds",
]

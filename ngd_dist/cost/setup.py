"""The training whose cost is counted: a model, its optimizer, and how a step is divided."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ngd_dist.config import KFAC, AdaptiveInterval, FixedInterval, NGDConfig
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.engines import ENGINES, EngineCost, EngineName
from ngd_dist.cost.methods import LayerCost, layer_cost, of_samples, with_few_rows, with_gradient_rows
from ngd_dist.cost.placement import Owners, owners_of

__all__ = ["DEFAULT_REFRESH_SHARE", "FirstOrder", "Occasion", "Setup"]

# The share of all statistics that an adaptive schedule refreshes in a step. [OT20] reports 0.05 to 0.24 of the volume
# at batches of 4,096 to 32,768; small batches are noisier, and refresh more.
DEFAULT_REFRESH_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class FirstOrder:
    """An optimizer without curvature. state: numbers that it keeps for each weight: 1 under momentum, 2 under AdamW."""

    kind: str
    state: int


@dataclass(frozen=True, slots=True)
class Occasion:
    """A kind of step: the share of the steps that are of it, and the statistics that are due in it.

    due: whether statistics in the standard basis are, and whether those in another basis are. is_averaged: they enter
    the average, and no inverse is made of them yet.
    """

    share: float
    due: tuple[bool, bool] = (False, False)
    is_averaged: bool = False


@dataclass(frozen=True)
class Setup:
    """One way to train a model. samples: those of each rank in a step, in `micro_batches` passes.

    refresh_share: that of an adaptive schedule; a fixed one says its own.
    """

    card: ModelCard
    optimizer: NGDConfig | FirstOrder
    world_size: int
    samples: int
    micro_batches: int = 1
    engine_name: EngineName = "bare"
    refresh_share: float = DEFAULT_REFRESH_SHARE

    @property
    def engine(self) -> EngineCost:
        """The engine; without NGD another must average for a bare model on several ranks."""
        is_ngd = isinstance(self.optimizer, NGDConfig)
        name = self.engine_name if is_ngd or self.engine_name != "bare" or self.world_size == 1 else "ddp"
        return ENGINES[name]

    @property
    def config(self) -> NGDConfig | None:
        """The settings of NGD; None under another optimizer."""
        return self.optimizer if isinstance(self.optimizer, NGDConfig) else None

    @cached_property
    def layers(self) -> Mapping[str, LayerCost]:
        """The preconditioned layers, by name."""
        config = self.config
        if config is None:
            return {}
        costs = {
            layer.name: of_samples(layer_cost(layer, config), self.statistic_samples) for layer in self.card.layers
        }
        if self.world_size > 1 or not _may_be_rows(config):
            return costs
        if self.micro_batches == 1 and config.may_keep_rows:
            costs = {n: with_few_rows(c, self.statistic_samples * c.card.positions) for n, c in costs.items()}
        return {n: with_gradient_rows(c, self.samples * c.card.positions) for n, c in costs.items()}

    @property
    def statistic_samples(self) -> int:
        """The samples of a rank and step that statistics are made of."""
        fraction = 1.0 if self.config is None else self.config.statistics_fraction
        return max(self.micro_batches, round(self.samples * fraction))

    @cached_property
    def owners(self) -> Owners:
        """The owner of each layer."""
        assert self.config is not None
        local = [name for name, layer in self.layers.items() if layer.is_local]
        costs = {name: layer.refresh_flops for name, layer in self.layers.items()}
        # Local ones are placed before the samples of a rank are known.
        costs |= {name: layer_cost(self.layers[name].card, self.config).refresh_flops for name in local}
        return owners_of(costs, self.config, self.world_size, local)

    @cached_property
    def occasions(self) -> tuple[Occasion, ...]:
        """The kinds of steps that alternate; their shares add up to 1.

        They are those of a schedule without stagger, which sends the same statistics, but for some bytes of reports.
        """
        if self.config is None:
            return (Occasion(1.0),)
        refresh, estimate = _shares(self.config.staleness, self.refresh_share)
        has_basis = any(s.in_basis for layer in self.layers.values() for s in layer.statistics)
        if has_basis:  # a basis lasts for two steps at least, and is measured in once, after it was made
            refresh = min(refresh, 0.5)
            kinds = [Occasion(refresh, (True, False)), Occasion(refresh, (False, True))]
        else:
            averaged = [Occasion(estimate - refresh, (True, False), is_averaged=True)] if estimate > refresh else []
            kinds = [Occasion(refresh, (True, False)), *averaged]
        rest = 1.0 - sum(kind.share for kind in kinds)
        return tuple([*kinds, Occasion(rest)] if rest > 1e-12 else kinds)

    @property
    def refreshes(self) -> float:
        """The mean number of times in a step that each layer is inverted."""
        return sum(kind.share for kind in self.occasions if kind.due[0] and not kind.is_averaged)

    @property
    def estimates(self) -> float:
        """The mean number of times in a step that each statistic in the standard basis is estimated."""
        return sum(kind.share for kind in self.occasions if kind.due[0])


def _may_be_rows(config: NGDConfig) -> bool:
    """Returns whether the method makes use of few rows, as `KFAC.forms` decides."""
    choice = config.preconditioner
    return isinstance(choice, KFAC) and choice.rows is None and choice.damping_form == "pi"


def _shares(staleness: AdaptiveInterval | FixedInterval, assumed: float) -> tuple[float, float]:
    """Returns the shares of the steps in which a statistic makes a new inverse, and in which it is estimated."""
    if isinstance(staleness, FixedInterval):
        return 1 / staleness.steps, 1 / staleness.estimate_steps
    return assumed, assumed

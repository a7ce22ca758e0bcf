"""The plan of a job: what a step costs, what the job does, how it scales, and what other choices would cost."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import Field

from ngd_dist.config import AllReduce, OwnerSharded, Settings
from ngd_dist.cost.cluster import Cluster
from ngd_dist.cost.engines import ENGINES, EngineName
from ngd_dist.cost.memory import bytes_held, fullest_rank
from ngd_dist.cost.placement import strategy_of
from ngd_dist.cost.seconds import Network, seconds
from ngd_dist.cost.setup import Setup
from ngd_dist.cost.traffic import COLLECTIVE, mean_traffic

__all__ = ["Alternative", "Plan", "Prediction", "ScalingPoint", "plan", "predict"]

MAX_RANKS = 1024
GIB = 2**30
MUCH_TRAFFIC = 4  # times the mean of the ranks


class Prediction(Settings):
    """The cost of a step. Bytes and seconds are means over all steps of the schedule."""

    engine: EngineName
    strategy: str = Field(description="The movement of tensors between ranks; none under another optimizer.")
    ranks: int
    memory_bytes: dict[str, int] = Field(description="By kind, on the rank that holds most.")
    bytes_sent: dict[str, float] = Field(description="By kind: of a rank, the mean over ranks.")
    busiest_bytes: float = Field(description="Sent or received by the rank with most traffic.")
    bytes_between_nodes: float = Field(description="That leave each node.")
    seconds: dict[str, float] = Field(description="By phase; communication is that which backward does not hide.")
    fits: bool

    @property
    def memory(self) -> int:
        """The bytes on the rank that holds most."""
        return sum(self.memory_bytes.values())

    @property
    def step_seconds(self) -> float:
        """The seconds of a step."""
        return sum(self.seconds.values())


class ScalingPoint(Settings):
    """A number of ranks. efficiency: samples a second and rank, as a share of those of one rank."""

    ranks: int
    samples_per_rank: int
    step_seconds: float
    samples_per_second: float
    efficiency: float
    fits: bool


class Alternative(Settings):
    """The same job with one choice changed."""

    change: str
    memory_bytes: int
    bytes_sent: float
    step_seconds: float
    fits: bool


class Plan(Settings):
    """The cost of a job before it runs. `scaling`: with the same samples on each rank; `strong_scaling`: with the same
    samples in all."""

    parameters: int
    layers: int
    samples_per_rank: int
    device: str
    memory_gib: float = Field(description="Of a device.")
    step: Prediction
    steps: int | None = Field(description="Of the job; None: the number of samples is not known.")
    job_seconds: float | None = Field(description="Of all steps, without start-up, evaluation and checkpoints.")
    scaling: list[ScalingPoint]
    strong_scaling: list[ScalingPoint]
    alternatives: list[Alternative]
    warnings: list[str]
    assumptions: list[str]


def plan(setup: Setup, cluster: Cluster, *, steps: int | None = None, is_calibrated: bool = False) -> Plan:
    """Returns the plan of a training of this many steps. Raises: ConfigError for a method that is not known here.

    >>> from ngd_dist.config import NGDConfig
    >>> from ngd_dist.cost.card import ModelCard
    >>> card = ModelCard(layers=[{"name": "0", "inputs": 785, "outputs": 10, "positions": 1}], forward_flops=15680)
    >>> cluster = Cluster.model_validate({"devices_per_node": 4, "device": "v100"})
    >>> round(plan(Setup(card, NGDConfig(), world_size=4, samples=256), cluster).step.memory_bytes["weights"] / 1e3)
    31
    """
    step = predict(setup, cluster)
    alternatives = list(_alternatives(setup, cluster))
    return Plan(
        parameters=setup.card.parameters,
        layers=len(setup.card.layers),
        samples_per_rank=setup.samples,
        device=cluster.device.name,
        memory_gib=cluster.device.memory_gib,
        step=step,
        steps=steps,
        job_seconds=None if steps is None else steps * step.step_seconds,
        scaling=_scaling(setup, cluster, is_strong=False),
        strong_scaling=_scaling(setup, cluster, is_strong=True),
        alternatives=alternatives,
        warnings=list(_warnings(setup, cluster, step, alternatives)),
        assumptions=list(_assumptions(setup, is_calibrated)),
    )


def predict(setup: Setup, cluster: Cluster) -> Prediction:
    """Returns the cost of a step."""
    held = bytes_held(setup, fullest_rank(setup))
    traffic = mean_traffic(setup)
    sent = traffic.mean_sent
    by_ring = sum(sent[kind] for kind in sent if kind in COLLECTIVE)
    network = Network(cluster, setup.world_size)
    return Prediction(
        engine=setup.engine_name,
        strategy="none" if setup.config is None else strategy_of(setup.config, setup.world_size).kind,
        ranks=setup.world_size,
        memory_bytes=held,
        bytes_sent=sent,
        busiest_bytes=sum(traffic.busiest.values()),
        bytes_between_nodes=network.bytes_between(by_ring, sum(sent.values()) - by_ring),
        seconds=seconds(setup, cluster, traffic=traffic),
        fits=sum(held.values()) <= cluster.device.memory_gib * GIB,
    )


def _scaling(setup: Setup, cluster: Cluster, *, is_strong: bool) -> list[ScalingPoint]:
    """Returns 1, 2, 4 ... 1,024 ranks, as far as the samples divide."""
    points: list[ScalingPoint] = []
    total, ranks = setup.samples * setup.world_size, 1
    micro = max(1, setup.samples // setup.micro_batches)
    while ranks <= MAX_RANKS and not (is_strong and total % ranks):
        samples = total // ranks if is_strong else setup.samples
        micro_batches = max(1, samples // micro) if is_strong else setup.micro_batches
        step = predict(_at(setup, ranks, samples, micro_batches), cluster)
        rate = samples * ranks / step.step_seconds
        first = points[0].samples_per_second if points else rate
        points.append(
            ScalingPoint(
                ranks=ranks,
                samples_per_rank=samples,
                step_seconds=step.step_seconds,
                samples_per_second=rate,
                efficiency=rate / first / ranks,
                fits=step.fits,
            )
        )
        ranks *= 2
    return points


def _at(setup: Setup, ranks: int, samples: int, micro_batches: int) -> Setup:
    changed = replace(setup, world_size=ranks, samples=samples, micro_batches=micro_batches)
    config = setup.config
    if config is not None and config.strategy is not None and config.strategy.kind == "single" and ranks > 1:
        changed = _with(changed, strategy=None)
    return changed


def _alternatives(setup: Setup, cluster: Cluster) -> Iterator[Alternative]:
    for change, other in _changed(setup):
        step = predict(other, cluster)
        yield Alternative(
            change=change,
            memory_bytes=step.memory,
            bytes_sent=sum(step.bytes_sent.values()),
            step_seconds=step.step_seconds,
            fits=step.fits,
        )


def _changed(setup: Setup) -> Iterator[tuple[str, Setup]]:
    config = setup.config
    if setup.world_size > 1:
        for name in ENGINES:
            if name != setup.engine_name and (config is not None or name not in ("bare", "ddp")):
                yield f"engine {name}", replace(setup, engine_name=name)
    if config is None:
        return
    if setup.world_size > 1:
        now = strategy_of(config, setup.world_size)
        below = now.replicate_below if isinstance(now, OwnerSharded) else OwnerSharded().replicate_below
        sharded = [OwnerSharded(fraction=fraction, replicate_below=below) for fraction in (0.0, 0.5, 1.0)]
        for strategy in (AllReduce(), *sharded):
            if strategy != now:
                fraction = (
                    f", held by {strategy.fraction:.0%} of the ranks" if isinstance(strategy, OwnerSharded) else ""
                )
                yield f"strategy {strategy.kind}{fraction}", _with(setup, strategy=strategy)
    for share in (1.0, 0.25):
        if share != config.statistics_fraction:
            yield f"statistics of {share:.0%} of the samples", _with(setup, statistics_fraction=share)


def _with(setup: Setup, **changes: Any) -> Setup:
    assert setup.config is not None
    return replace(setup, optimizer=setup.config.model_copy(update=changes))


def _warnings(setup: Setup, cluster: Cluster, step: Prediction, alternatives: list[Alternative]) -> Iterator[str]:
    if setup.world_size > cluster.ranks:
        yield (
            f"the job takes {setup.world_size} workers and the cluster has {cluster.ranks} devices: take fewer "
            "workers, or more nodes"
        )
    if not step.fits:
        fitting = [other.change for other in alternatives if other.fits]
        remedy = f"it would fit with {fitting[0]}" if fitting else "none of the alternatives fits"
        largest = max(step.memory_bytes, key=lambda kind: step.memory_bytes[kind])
        yield (
            f"it would not fit: a rank holds {step.memory / GIB:.1f} GiB, of which {largest} are "
            f"{step.memory_bytes[largest] / GIB:.1f}, and a device has {cluster.device.memory_gib:g}; take a smaller "
            f"batch.micro_size or more workers; {remedy}"
        )
    mean = sum(step.bytes_sent.values())
    if step.busiest_bytes > MUCH_TRAFFIC * mean and step.seconds["communication"] > step.step_seconds / 2:
        yield (
            f"the owner with most traffic sends or receives {step.busiest_bytes / 1e9:.2f} GB in a step, "
            f"{step.busiest_bytes / mean:.0f} times the mean of the ranks, since some ranks hold a layer beside its "
            "owner and others don't; take strategy.fraction 0 or 1, fewer workers with more samples each, or longer "
            "intervals"
        )
    if setup.config is not None and setup.config.needs_objective:
        yield "the settings evaluate the loss again in each step: that time is not counted"


def _assumptions(setup: Setup, is_calibrated: bool) -> Iterator[str]:
    if setup.config is not None and setup.config.staleness.kind == "adaptive":
        yield f"an adaptive schedule refreshes {setup.refresh_share:.0%} of all statistics in a step"
    if not is_calibrated:
        yield "rates are shares of the device's peak, and were not measured"
    yield "no time is counted for data, tests and checkpoints, nor for the loop itself: most of a small job's"
    if setup.engine_name not in ("bare", "ddp"):
        yield f"bytes and memory under {setup.engine_name} are those that its collectives must move, not counted ones"
    yield "activations are those of forward that autograd keeps; an allocator takes more"

"""Events of a worker for the service: append-only, numbered within their attempt. Imports without torch.

Rank 0's reporter writes events to a spool file, one JSON object a line, and posts them in batches. The service stores
an event under the key (attempt, seq), so that a repeated delivery changes nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from ngd_workers.contract.names import MetricName

__all__ = [
    "Event",
    "EventBatch",
    "EventReply",
    "Judged",
    "Layers",
    "Metric",
    "Numbered",
    "Ranks",
    "StepRecord",
    "metric_words",
    "with_metrics",
]

MetricValues = Annotated[dict[MetricName, float], Field(max_length=32)]


class Fact(BaseModel):
    """Base of every event. NaN and infinity travel as the strings "NaN", "Infinity" and "-Infinity".

    A field that this version does not know is passed over: workers may be of a later version than their service.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class Metric(Fact):
    """One of the numbers that say how good the model is. It is `name` in training, `test_<name>` on the test data."""

    name: MetricName
    label: str = Field(max_length=40, description='For people: "accuracy", "BLEU".')
    better: Literal["higher", "lower"]
    unit: Literal["number", "share"] = Field(default="number", description="share: in [0, 1], shown as per cent.")


def metric_words(which: str, values: Mapping[str, float]) -> list[str]:
    """Returns each value after its name, for a log.

    >>> metric_words("test", {"r2": 0.97034, "rmse": 20053.4})
    ['test r2 0.9703', 'test rmse 20,053']
    """
    return [f"{which} {name} {value:{',.0f' if 1e3 <= abs(value) < 1e9 else '.4g'}}" for name, value in values.items()]


def with_metrics(given: Any) -> Any:
    """Returns an event or outcome of version 0.1, which had the test data's metrics as fields test_<name>, with
    `metrics` in their place; all else as it is."""
    if not isinstance(given, dict) or "metrics" in given:
        return given
    tested = {name.removeprefix("test_"): value for name, value in given.items() if name.startswith("test_")}
    rest = {name: value for name, value in given.items() if not name.startswith("test_")}
    known = {name: value for name, value in tested.items() if value is not None}
    return rest | {"metrics": known} if tested else given


class Started(Fact):
    """The workers are up. A restarted worker group sends this again, with the step from which it resumes."""

    kind: Literal["started"] = "started"
    spec: dict[str, Any] = Field(description="The resolved spec, defaults filled in.")
    seed: int
    commit: str | None = Field(description="git commit of the code; None outside a checkout.")
    versions: dict[str, str] = Field(description="python, torch, ngd_dist ...")
    world_size: int
    device: str
    total_steps: int | None
    steps_per_epoch: int | None
    parameters: int | None = Field(description="Number of the model's trainable weights.")
    resumed_step: int = Field(description="Step of the checkpoint from which this run starts; 0: no checkpoint.")
    statistics: list[str] = Field(
        description='Names "layer.statistic", in the order of the ages and intervals of a step.'
    )
    plain_parameters: dict[str, str] = Field(description="Name of each parameter without a preconditioner -> reason.")
    layers: list[str] = Field(default=[], description="Names of the preconditioned layers, in the order of `Layers`.")
    hosts: list[str] = Field(default=[], description="Name of each rank's machine.")
    owners: list[int | None] = Field(
        default=[], description="Rank that inverts each of the `statistics`; None: every rank does."
    )
    metrics: list[Metric] = Field(
        default=[], max_length=32, description="The task's metrics, the one that counts first; loss is among them."
    )


class Judged(Fact):
    """The statistics that were due in a step, 1,000 at most, as columns: why each was given the interval that it has,
    and how it was inverted.

    None: not measured, as the change of a first value and all that a fixed interval needs not.
    """

    statistics: list[int] = Field(description="Places in the `statistics` of the start.")
    changes: list[float | None] = Field(description="Relative change against the value in use.")
    noises: list[float | None] = Field(description="Relative change that sampling alone makes expected.")
    thresholds: list[float | None] = Field(description="Change, or error, from which on the interval shrinks.")
    errors: list[float | None] = Field(description="Error of the inverse in use for the new value.")
    failed: dict[int, str] = Field(default={}, description="Place -> ending of each inversion that failed.")
    # Optional: spools of earlier versions lack them.
    residuals: list[float | None] = Field(default=[], description="||I - X inverse|| / sqrt(n) of the new inverse.")
    inversion_seconds: list[float | None] = Field(default=[], description="Host seconds on the rank that inverted.")
    methods: dict[str, list[int]] = Field(
        default={},
        description="Method -> places of the statistics that it was tried on last; others were not inverted.",
    )


class Layers(Fact):
    """Gradient and update of each layer, 1,000 at most, in the order of the start's `layers`; told of some steps.

    Norms and cosines are those of `ngd_dist.telemetry.LayerStats`.
    """

    step: int = Field(description="The step that was measured; a record tells of an earlier one.")
    gradient_norms: list[float]
    update_norms: list[float] = Field(description="Of lr times the clipped direction, without momentum and decay.")
    cosines: list[float | None] = Field(description="Of gradient and direction; None: one of them is 0.")
    kl: float | None = Field(description="KL divergence of the step in the damped quadratic model.")
    clip_factor: float | None = Field(description="Factor of the clip on all directions; None: the job has no clip.")
    spectra: dict[int, list[float | None]] = Field(
        default={},
        description="Place of a statistic -> its factor's eigenvalues: the least, three quartiles, the largest; then "
        "the damping in their unit, None if it is not known, and the condition number, None if it is infinite.",
    )
    estimated: list[int] = Field(
        default=[], description="Places of the statistics whose spectrum is an estimate: the others' are exact."
    )


class Ranks(Fact):
    """What each rank did since the last of these records, one number a rank, of 256 ranks at most; None: not known."""

    steps: int = Field(description="The steps that the seconds are means over.")
    seconds: dict[str, list[float]] = Field(description="Phase -> seconds a step.")
    cpu: list[float | None] = Field(description="Cores that the process kept busy; None: psutil is not installed.")
    memory_bytes: list[float | None] = Field(description="Resident memory of the process.")
    gpu: list[float | None] = Field(description="Share of the time in which the GPU was busy; needs pynvml.")
    gpu_memory_bytes: list[float | None] = Field(description="Memory that torch has reserved on the GPU.")
    sent_bytes_per_s: list[float | None] = Field(description="By the machine's network, loopback left out.")
    received_bytes_per_s: list[float | None] = Field(description="By the machine's network, loopback left out.")


class StepRecord(Fact):
    """One optimizer step. Step numbers start at 1."""

    step: int = Field(ge=1)
    epoch: float | None = None
    time_s: float = Field(description="Seconds since the epoch (UTC) at the end of the step.")
    metrics: MetricValues = Field(description="Of the global batch in training: loss, the mean, and the task's own.")
    # Optional: a loop of the user's own has not all of them, and spools of earlier versions lack some.
    lr: float | None = Field(
        default=None, description="Learning rate of the step, from the schedule or from the quadratic model."
    )
    samples_per_s: float | None = None
    seconds: dict[str, float] = Field(
        default={}, description="Phase -> seconds on rank 0: data, forward_backward, reduce ..."
    )
    bytes_sent: dict[str, int] = Field(
        default={}, description="Kind -> bytes sent by rank 0: gradients, statistics, directions."
    )
    ages: list[int] = Field(
        default=[], description="Steps since each statistic in use was measured; 0: measured in this step."
    )
    intervals: list[int] = Field(default=[], description="Steps from one refresh of each statistic to the next.")
    judged: Judged | None = Field(
        default=None, description="The statistics that were due; None: nothing was measured of them, or none was due."
    )
    failed_inversions: int = Field(
        default=0, description="Failed inversions so far, over all ranks; each kept the old inverse."
    )
    skipped_samples: int = Field(
        default=0, description="Samples left out so far, over all ranks, since they could not be read."
    )
    skipped_steps: int = Field(default=0, description="Steps skipped so far because a gradient was NaN or infinite.")
    damping: float | None = Field(default=None, description="lambda after the step; None: the optimizer has none.")
    momentum: float | None = Field(
        default=None, description="Momentum that the quadratic model chose; None: it chose none."
    )
    reduction_ratio: float | None = Field(
        default=None,
        description="rho: change of the loss, divided by the quadratic model's prediction; None: not measured.",
    )
    layers: Layers | None = Field(default=None, description="Of an earlier step; None in most.")
    ranks: Ranks | None = Field(default=None, description="Every five seconds or so; None in the other steps.")
    bytes_so_far: int | None = Field(default=None, description="Bytes sent by rank 0 in all steps of the job.")

    @model_validator(mode="before")
    @classmethod
    def _with_metrics(cls, given: object) -> object:
        """Takes a record of version 0.1, which had each metric as a field."""
        if not isinstance(given, dict) or "metrics" in given:
            return given
        metrics = {name: value for name, value in given.items() if name not in cls.model_fields}
        return {name: value for name, value in given.items() if name not in metrics} | {"metrics": metrics}


class Steps(Fact):
    """A batch of optimizer steps."""

    kind: Literal["steps"] = "steps"
    records: list[StepRecord]


class Evaluation(Fact):
    """One pass over the test data."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    epoch: float | None = None
    metrics: MetricValues = Field(description="Of the test data: loss, the mean, and the task's own.")

    @model_validator(mode="before")
    @classmethod
    def _with_metrics(cls, given: object) -> object:
        return with_metrics(given)


class CheckpointSaved(Fact):
    """A checkpoint is complete on disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str = Field(description="Relative to the run directory.")
    bytes: int


class TargetReached(Fact):
    """The first evaluation that reaches the spec's target."""

    kind: Literal["target_reached"] = "target_reached"
    step: int
    metrics: MetricValues = Field(description="The target's metric and its value.")

    @model_validator(mode="before")
    @classmethod
    def _with_metrics(cls, given: object) -> object:
        return with_metrics(given)


class CheckpointFailed(Fact):
    """A checkpoint could not be written; training goes on to the next one."""

    kind: Literal["checkpoint_failed"] = "checkpoint_failed"
    step: int
    message: str


class StepsLost(Fact):
    """The records of some steps are lost: the curves keep a hole there."""

    kind: Literal["steps_lost"] = "steps_lost"
    first_step: int
    last_step: int
    message: str


class Waiting(Fact):
    """The driver waits for CPUs or GPUs before it starts the workers."""

    kind: Literal["waiting"] = "waiting"
    message: str | None = Field(
        description="The missing resource and the amounts wanted and present; None: the wait is over."
    )


class WorkersRestarted(Fact):
    """The driver starts the workers again after some of them died."""

    kind: Literal["workers_restarted"] = "workers_restarted"
    message: str


class WorkersResized(Fact):
    """The driver starts the workers again, mostly in another number. They had stopped in order: no step is lost."""

    kind: Literal["workers_resized"] = "workers_resized"
    before: int = Field(description="Workers until now.")
    after: int = Field(description="Workers from now on.")
    message: str = Field(description="The reason: a node that is to be taken away, or room for more workers.")


class Failed(Fact):
    """The attempt ended without a result."""

    kind: Literal["failed"] = "failed"
    reason: str = Field(description="CamelCase word for machines: InvalidSpec, DataNotFound, NonFiniteLoss ...")
    message: str = Field(description="One sentence for a person: the problem, the value and the remedy.")
    retryable: bool


class Cancelled(Fact):
    """The attempt stopped because the job was cancelled, or because a signal asked for it."""

    kind: Literal["cancelled"] = "cancelled"
    step: int


class Done(Fact):
    """The attempt finished its schedule or reached its target."""

    kind: Literal["done"] = "done"
    step: int
    metrics: MetricValues = Field(description="Of the test data, after the last step.")
    target_step: int | None
    seconds: float | None = Field(description="Wall time of training, without start-up.")

    @model_validator(mode="before")
    @classmethod
    def _with_metrics(cls, given: object) -> object:
        return with_metrics(given)


Event = Annotated[
    Started
    | Steps
    | Evaluation
    | CheckpointSaved
    | CheckpointFailed
    | StepsLost
    | TargetReached
    | Waiting
    | WorkersRestarted
    | WorkersResized
    | Failed
    | Cancelled
    | Done,
    Field(discriminator="kind"),
]


class Numbered(Fact):
    """An event with its place in the attempt's stream. seq starts at 1 and has no gaps."""

    seq: int = Field(ge=1)
    time_s: float
    event: Event


class EventBatch(Fact):
    """Body of POST /api/v1/internal/attempts/{attempt}/events. Another field in it is refused: it is no batch."""

    model_config = ConfigDict(extra="forbid")

    events: list[Numbered]


class EventReply(Fact):
    """Answer to a batch: the state that the user wants for the job, and the last seq stored without a gap."""

    desired: Literal["RUNNING", "CANCELLED"]
    acknowledged_seq: int


numbered = TypeAdapter(Numbered)
event: TypeAdapter[Event] = TypeAdapter(Event)

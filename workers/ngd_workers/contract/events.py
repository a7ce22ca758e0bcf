"""Events of a worker for the service: append-only, numbered within their attempt. Imports without torch.

Rank 0's reporter writes events to a spool file, one JSON object a line, and posts them in batches. The service stores
an event under the key (attempt, seq), so that a repeated delivery changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

__all__ = ["Event", "EventBatch", "EventReply", "Numbered", "StepRecord"]


class Fact(BaseModel):
    """Base of every event. NaN and infinity travel as the strings "NaN", "Infinity" and "-Infinity"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Started(Fact):
    """The workers are up. A restarted worker group sends this again, with the step from which it resumes."""

    kind: Literal["started"] = "started"
    spec: dict[str, Any] = Field(description="The resolved spec, defaults filled in.")
    seed: int
    commit: str | None = Field(description="git commit of the code; None outside a checkout.")
    versions: dict[str, str] = Field(description="python, torch, ngd_dist ...")
    world_size: int
    device: str
    total_steps: int
    steps_per_epoch: int
    parameters: int = Field(description="Number of the model's trainable weights.")
    resumed_step: int = Field(description="Step of the checkpoint from which this run starts; 0: no checkpoint.")
    statistics: list[str] = Field(
        description='Names "layer.statistic", in the order of the ages and intervals of a step.'
    )
    plain_parameters: dict[str, str] = Field(description="Name of each parameter without a preconditioner -> reason.")


class StepRecord(Fact):
    """One optimizer step. Step numbers start at 1."""

    step: int = Field(ge=1)
    epoch: float
    time_s: float = Field(description="Seconds since the epoch (UTC) at the end of the step.")
    loss: float = Field(description="Mean training loss of the global batch.")
    accuracy: float = Field(description="Share of the global batch classified correctly.")
    lr: float = Field(description="Learning rate of the step, from the schedule or from the quadratic model.")
    samples_per_s: float
    seconds: dict[str, float] = Field(description="Phase -> seconds on rank 0: data, forward_backward, reduce ...")
    bytes_sent: dict[str, int] = Field(description="Kind -> bytes sent by rank 0: gradients, statistics, directions.")
    ages: list[int] = Field(description="Steps since each statistic in use was measured; 0: measured in this step.")
    intervals: list[int] = Field(description="Steps from one refresh of each statistic to the next.")
    failed_inversions: int = Field(description="Failed inversions so far, over all ranks; each kept the old inverse.")
    # Optional: spools of earlier versions lack them.
    skipped_steps: int = Field(default=0, description="Steps skipped so far because a gradient was NaN or infinite.")
    damping: float | None = Field(default=None, description="lambda after the step; None: the optimizer has none.")
    momentum: float | None = Field(
        default=None, description="Momentum that the quadratic model chose; None: it chose none."
    )
    reduction_ratio: float | None = Field(
        default=None,
        description="rho: change of the loss, divided by the quadratic model's prediction; None: not measured.",
    )


class Steps(Fact):
    """A batch of optimizer steps."""

    kind: Literal["steps"] = "steps"
    records: list[StepRecord]


class Evaluation(Fact):
    """One pass over the test data."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    epoch: float
    test_loss: float
    test_accuracy: float


class CheckpointSaved(Fact):
    """A checkpoint is complete on disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str = Field(description="Relative to the run directory.")
    bytes: int


class TargetReached(Fact):
    """The first evaluation at or above the spec's target."""

    kind: Literal["target_reached"] = "target_reached"
    step: int
    test_accuracy: float


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
    test_loss: float
    test_accuracy: float
    target_step: int | None
    seconds: float = Field(description="Wall time of training, without start-up.")


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
    """Body of POST /api/v1/internal/attempts/{attempt}/events."""

    events: list[Numbered]


class EventReply(Fact):
    """Answer to a batch: the state that the user wants for the job, and the last seq stored without a gap."""

    desired: Literal["RUNNING", "CANCELLED"]
    acknowledged_seq: int


numbered = TypeAdapter(Numbered)

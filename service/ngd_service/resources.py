"""What the REST API returns. The routes answer with these models, the client reads them; unknown fields are ignored."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

__all__ = [
    "Checkpoint",
    "CheckpointFile",
    "CheckpointList",
    "Event",
    "EventPage",
    "Health",
    "Job",
    "JobPage",
    "Judgements",
    "LogChunk",
    "Metric",
    "Metrics",
    "Problem",
    "ProblemItem",
    "Progress",
    "Result",
    "Series",
    "Statistics",
    "Status",
    "StepRange",
    "Validated",
]


def _rfc3339(value: datetime) -> str:
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str, when_used="json")]


class Resource(BaseModel):
    """Base of the API's answers. NaN and infinity travel as the strings "NaN", "Infinity" and "-Infinity"."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class StepRange(Resource):
    """Neighbouring steps, both ends included."""

    first_step: int
    last_step: int


class CheckpointFile(Resource):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Checkpoint(Resource):
    """The model and all that training needs to go on from this step."""

    step: int
    attempt: int = Field(description="The attempt that has written it.")
    world_size: int = Field(description="Number of workers that have written it; any number can go on from it.")
    bytes: int = Field(description="Of all files.")
    metrics: dict[str, float] = Field({}, description="On the test data at this step; empty if it was not tested.")
    is_best: bool = Field(description="Whether the first metric is the best of the kept checkpoints.")
    is_pinned: bool = Field(False, description="Whether it stays, however many come after it.")
    files: dict[str, CheckpointFile] = Field(description="By name; weights.safetensors holds the model alone.")
    model: dict[str, Any] | None = Field(
        None, description="The shape of the data, and the model's inputs: with the spec, enough to build it again."
    )


class CheckpointList(Resource):
    """The checkpoints that a job keeps, newest first."""

    checkpoints: list[Checkpoint]


class Progress(Resource):
    """How far the training is."""

    step: int = Field(description="Optimizer steps done.")
    total_steps: int | None = Field(description="None until the workers have started.")
    epoch: float | None = None
    eta_s: float | None = Field(None, description="Seconds until the last step at the newest rate; None: unknown.")
    lost_steps: list[StepRange] = Field(
        [], description="Steps that were done and of which there is no record: the curves have a hole there."
    )
    skipped_samples: int = Field(0, description="Samples left out so far, since they could not be read.")
    target_step: int | None = Field(None, description="First tested step that reached spec.target; None: none has yet.")
    target_s: float | None = Field(
        None, description="Seconds from the first start of the workers to that test; None: unknown."
    )
    data_share: float | None = Field(
        None, description="Share of a step's time that rank 0 waits for data, a moving average; None: unknown."
    )


class Result(Resource):
    """How a job that succeeded ended."""

    metrics: dict[str, float] = Field({}, description="The task's metrics on the test data, after the last step.")
    step: int
    target_step: int | None = Field(description="First evaluated step that reaches spec.target; None: not reached.")
    seconds: float | None = Field(description="Wall time of training, start-up not counted.")


class Status(Resource):
    """The phase of a job, its reason, and its progress; only the service writes it."""

    phase: str = Field(
        description="QUEUED, STARTING, RUNNING, RECOVERING, CANCELLING, or one of the ends SUCCEEDED, FAILED, "
        "CANCELLED. Later versions may add phases."
    )
    is_terminal: bool = Field(description="Whether the phase can no longer change.")
    reason: str | None = Field(None, description="CamelCase word for machines.")
    message: str | None = Field(None, description="One sentence for a person.")
    attempt: int = Field(description="Number of the newest attempt; 0: none yet.")
    progress: Progress
    result: Result | None = None


class Metric(Resource):
    """One of the numbers that say how good the model is: `name` in training, test_<name> on the test data."""

    name: str
    label: str = Field(description='For people: "perplexity", "BLEU".')
    better: str | None = Field(None, description="higher or lower; None: unknown.")
    unit: str = Field("number", description="number; or share: in [0, 1], shown as per cent.")


class Job(Resource):
    """A job: its spec, the state that its user wants, and its status."""

    id: str = Field(description='"job_" and a ULID: sorts by time of creation.')
    name: str
    spec: dict[str, Any] = Field(description="JobSpec or LoopSpec with its defaults filled in.")
    desired_state: str = Field(description="What the user wants: RUNNING or CANCELLED.")
    status: Status
    metrics: list[Metric] = Field(
        [],
        description="The task's metrics, the one that counts first: the target's, if there is one. Empty until the "
        "workers have started.",
    )
    metrics_latest: dict[str, float] = Field(
        description="Newest values: lr, samples_per_s, and each of `metrics` as <name> and, on the test data, as "
        "test_<name>."
    )
    created_at: Time
    created_by: str | None = Field(None, description="Holder of the API key that it was posted with; None: no keys.")
    started_at: Time | None = Field(description="When the first attempt began.")
    finished_at: Time | None
    resource_version: int = Field(description="Grows with every change of the job.")


class JobPage(Resource):
    """A page of the list of jobs, newest first."""

    jobs: list[Job]
    next_page_token: str = Field(description='"" on the last page.')


class Validated(Resource):
    """Answer to validate_only: the spec as the job would run it."""

    spec: dict[str, Any]


class Event(Resource):
    """A fact about a job: from its workers (attempt and seq given) or from the controller (kind `phase`)."""

    id: int = Field(description="Cursor: grows within a job; use it as `after` or Last-Event-ID.")
    job_id: str
    attempt: int | None
    seq: int | None = Field(description="Place in the attempt's own stream; None: from the controller.")
    kind: str = Field(
        description="phase, or a worker's started, steps, evaluation, checkpoint, checkpoint_failed, steps_lost, "
        "target_reached, waiting, workers_restarted, workers_resized, failed, cancelled, done; steps_lost also from "
        "the controller."
    )
    time: Time
    data: dict[str, Any] = Field(
        description="phase: {from, to, reason, message}. steps: {first_step, last_step, latest}; the records are in "
        "/metrics. The others as the worker sent them."
    )


class EventPage(Resource):
    """A page of a job's events, oldest first."""

    events: list[Event]
    next_after: int = Field(description="`after` of the next page.")


class Series(Resource):
    """One curve: values[i] belongs to steps[i]."""

    steps: list[int]
    values: list[float]


class Metrics(Resource):
    """Curves of a job; of a long one the lowest and the highest value of each span of steps, the first and the last.

    A value that is not finite is among the points in place of the lowest one. From a step on means from the span on
    that holds it.
    """

    series: dict[str, Series] = Field(
        description="lr, momentum, damping, reduction_ratio, samples_per_s, epoch, time_s, failed_inversions, "
        "skipped_steps, skipped_samples, bytes_so_far, seconds.<phase>, bytes_sent.<kind>, and each of the job's "
        "metrics as <name> and test_<name>. Of some steps: layers.gradient_norm, layers.update_norm, "
        "layers.lowest_cosine, layers.kl, layers.clip_factor, and by rank ranks.cpu.<rank>, "
        "ranks.memory_bytes.<rank>, ranks.gpu.<rank>, ranks.gpu_memory_bytes.<rank>, "
        "ranks.sent_bytes_per_s.<rank>, ranks.received_bytes_per_s.<rank>. A job's absent ones are left out."
    )
    last_step: int = Field(description="Newest step stored; the next call's from_step is this + 1.")


class Judgements(Resource):
    """Why each statistic has its interval, rows and columns as in Statistics: the newest values within a column.

    None: the statistic was not due in it, or it was not measured.
    """

    changes: list[list[float | None]] = Field(description="Relative change against the value that was in use.")
    noises: list[list[float | None]] = Field(description="Relative change that sampling alone makes expected.")
    thresholds: list[list[float | None]] = Field(description="Change, or error, from which on the interval shrinks.")
    errors: list[list[float | None]] = Field(description="Error of the inverse in use, if `criterion` is error.")
    endings: list[list[str | None]] = Field(description="Ending of an inversion that failed.")


class Statistics(Resource):
    """Age and interval of each statistic, for the staleness heat map: rows as `names`, columns as `steps`."""

    names: list[str]
    steps: list[int] = Field(description="Last step of each column.")
    ages: list[list[int]] = Field(
        description="Steps since the statistic in use was measured, at the column's last step."
    )
    intervals: list[list[int]] = Field(description="Steps it may stay unrefreshed, at the column's last step.")
    refreshes: list[list[int]] = Field(description="Refreshes within the steps of the column.")
    judged: Judgements | None = Field(None, description="If asked for, and if the job's workers tell it.")
    span: int = Field(
        1,
        description="Steps that a column holds, a power of two; columns begin after its multiples, the first one too, "
        "and the last may still grow.",
    )
    last_step: int


class LayerAnatomy(Resource):
    """Gradient and update of each layer in one step. The update is lr times the clipped direction, without momentum."""

    step: int
    names: list[str]
    gradient_norms: list[float]
    update_norms: list[float]
    cosines: list[float | None] = Field(description="Of gradient and direction; None: one of them is 0.")
    kl: float | None = Field(description="KL divergence of the step in the damped quadratic model.")
    clip_factor: float | None = Field(description="Factor of the clip on all directions; None: the job has no clip.")


class FactorSpectrum(Resource):
    """Eigenvalues of a factor."""

    name: str = Field(description="layer.statistic")
    step: int = Field(description="The step that told it.")
    quantiles: list[float] = Field(description="The least eigenvalue, three quartiles, the largest.")
    damping: float | None = Field(description="In the unit of these eigenvalues; None: not known.")
    condition: float | None = Field(description="Condition number of the damped factor; None: infinite.")
    is_estimate: bool = Field(
        False,
        description="Whether a few products with the factor gave them, since its inversion makes no eigenvalues. The "
        "largest and the condition number are lower bounds then, the least is an upper bound.",
    )


class FactorInversion(Resource):
    """The newest inversion of a factor."""

    name: str = Field(description="layer.statistic")
    owner: int | None = Field(description="Rank that inverts it; None: every rank does.")
    step: int
    method: str | None = Field(
        description="The last that was tried: CHOLESKY, NEWTON_SCHULZ ...; None: the statistic was not fit for any."
    )
    residual: float | None = Field(
        description="||I - X inverse|| / sqrt(n) of the damped factor X; None: not measured, as of eigenvectors."
    )
    seconds: float | None = Field(
        description="Host seconds on the rank that inverted; of the time for several at once, the share of n^3."
    )
    ending: str = Field(description="OK, or why the old inverse stays in use.")


class RankAnatomy(Resource):
    """What each rank did in the steps before this one: a number a rank; None: it can't tell."""

    step: int
    steps: int = Field(description="The steps that the seconds are means over.")
    hosts: list[str]
    device: str
    seconds: dict[str, list[float]] = Field(description="Phase -> seconds a step.")
    cpu: list[float | None] = Field(description="Cores that the process kept busy.")
    memory_bytes: list[float | None] = Field(description="Resident memory of the process.")
    gpu: list[float | None] = Field(description="Share of the time in which the GPU was busy.")
    gpu_memory_bytes: list[float | None] = Field(description="Memory that torch has reserved on the GPU.")
    sent_bytes_per_s: list[float | None] = Field(description="By the machine's network.")
    received_bytes_per_s: list[float | None] = Field(description="By the machine's network.")


class Anatomy(Resource):
    """The newest that a job's workers have told of its layers, factors and ranks, among the steps asked for."""

    layers: LayerAnatomy | None = Field(
        description="None: no layer is preconditioned, or the version is an earlier one."
    )
    spectra: list[FactorSpectrum] = Field(description="Of the factors that are told.")
    inversions: list[FactorInversion] = Field([], description="Of each factor; of earlier versions none.")
    world_size: int = Field(1, description="Ranks of the newest start.")
    ranks: RankAnatomy | None
    last_step: int = Field(description="Newest step stored.")


class LogChunk(Resource):
    """Lines of an attempt's log, in order."""

    attempt: int
    text: str
    end: int = Field(0, description="`offset` of what follows.")


class Health(Resource):
    """Answer to a probe."""

    status: str = Field(description="ok or unavailable.")
    checks: dict[str, str] = Field({}, description="Check -> ok, or what is wrong.")


class ProblemItem(BaseModel):
    """One thing that is wrong with a request."""

    pointer: str = Field(description="JSON Pointer into the body, or the name of the parameter.")
    code: str = Field(description="snake_case word for machines.")
    detail: str = Field(description="What is wrong: the field, its bound, the value.")
    hint: str | None = Field(None, description="What to do.")


class Problem(BaseModel):
    """application/problem+json (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str = Field(description="snake_case word for machines.")
    errors: list[ProblemItem] = []
    request_id: str
    retryable: bool = Field(description="Whether the same request may succeed later.")

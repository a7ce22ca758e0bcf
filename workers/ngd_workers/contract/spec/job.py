"""A whole job: the body of ``POST /api/v1/jobs``, the argument of ``ngd submit`` and ``ngd train``, or a recipe."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ngd_dist.config import QuadraticModel, Single
from ngd_workers.contract.names import MetricName
from ngd_workers.contract.spec.base import MAX_STEPS, NAME_PATTERN, Function, Options, SpecModel
from ngd_workers.contract.spec.code import Code, Environment, Image, Secrets
from ngd_workers.contract.spec.engines import DDP, Bare, EngineChoice, Precision
from ngd_workers.contract.spec.models import InitChoice, InitFromCheckpoint, ModelChoice
from ngd_workers.contract.spec.optimizers import NGDOptimizer, OptimizerChoice
from ngd_workers.contract.spec.run import (
    Batch,
    Checkpoint,
    Failure,
    Loading,
    PolynomialLR,
    Resources,
    Schedule,
    Target,
)
from ngd_workers.contract.spec.sources import DataChoice
from ngd_workers.contract.spec.tasks import ImageClassification, TaskChoice
from ngd_workers.contract.spec.transforms import TransformChoice

__all__ = [
    "AnySpec",
    "Job",
    "JobSpec",
    "KeptCheckpoints",
    "LoopSpec",
    "OwnLoop",
    "OwnMetric",
    "spec_class",
    "spec_of_json",
]

LabelName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^[ -~]{1,63}$")]


class Job(SpecModel):
    """What every job has, whichever loop trains it."""

    name: str = Field(pattern=NAME_PATTERN, description="Lower-case letters, digits and hyphens, at most 63 in all.")
    labels: dict[LabelName, LabelValue] = Field(
        default={}, max_length=16, description="Words to find the job by, such as team: vision."
    )
    resources: Resources = Resources()
    failure: Failure = Failure()
    target: Target | None = None
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the first weights, of the order of samples and of dropout."
    )
    code: Code | None = Field(default=None, description="A folder of your own that travels with the job; None: none.")
    image: Image | None = None
    env: Environment = Field(default={})
    secrets: Secrets = Field(default={})

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of workers with which the job may run, in rising order: one alone if it is not elastic."""
        return tuple(self.resources.sizes)

    def at(self, world_size: int) -> Self:
        """Returns this job with a fixed number of workers, and the global batch as it was.

        An elastic job keeps its micro-batches too. Raises: ValueError if the job can't run with so many.
        """
        if self.resources.is_elastic and world_size not in self.sizes:
            raise ValueError(f"it runs with {_listed(self.sizes)} workers, got {world_size}; start as many")
        if not self.resources.is_elastic and world_size == self.resources.workers:
            return self
        fixed = {"workers": world_size, "min_workers": None, "max_workers": None}
        return self._with({"resources": self.resources.model_dump() | fixed})

    def _with(self, changes: dict[str, Any]) -> Self:
        return type(self).model_validate(self.model_dump() | changes)

    @model_validator(mode="after")
    def _variables_have_one_value(self) -> Self:
        if twice := sorted(self.env.keys() & self.secrets.keys()):
            raise ValueError(f"env and secrets both set {', '.join(twice)}, and one can count; leave one out")
        return self


class JobSpec(Job):
    """A job of the service's own loop. The same spec gives the same result with the same versions of the libraries."""

    model: ModelChoice
    init_from: InitChoice | None = Field(default=None, description="Where the first weights are; None: random ones.")
    data: DataChoice
    task: TaskChoice = ImageClassification()
    optimizer: OptimizerChoice
    transform: TransformChoice | None = Field(
        default=None, description="A method that changes the model for training, and gives it back plain; None: none."
    )
    engine: EngineChoice | None = Field(
        default=None,
        description="The part that averages gradients over workers, and may shard the model. None: bare under "
        "optimizer ngd, ddp under the others. One worker alone has the bare model.",
    )
    precision: Precision = Field(
        default="fp32",
        description="Of the products in forward and backward passes, by torch.autocast; weights, gradients, statistics "
        "and the optimizer's state stay in float32. fp16 brings a loss scale.",
    )
    schedule: Schedule
    batch: Batch
    loading: Loading = Loading()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _strategy_reaches_all_workers(self) -> Self:
        strategy = self.optimizer.strategy if isinstance(self.optimizer, NGDOptimizer) else None
        if isinstance(strategy, Single) and self.resources.workers > 1:
            raise ValueError(
                f"optimizer.strategy single takes resources.workers 1, got {self.resources.workers}; take "
                "owner_sharded or all_reduce, or leave optimizer.strategy out"
            )
        return self

    @model_validator(mode="after")
    def _lr_is_set_once(self) -> Self:
        given = isinstance(self.schedule.lr, PolynomialLR) or self.schedule.warmup_steps > 0
        if given and isinstance(self.optimizer, NGDOptimizer) and isinstance(self.optimizer.length, QuadraticModel):
            raise ValueError(
                "optimizer.step_length quadratic_model chooses lr at every step, so schedule.lr must be constant and "
                f"schedule.warmup_steps 0, got {self.schedule.lr.kind} and {self.schedule.warmup_steps}; leave both out"
            )
        return self

    @model_validator(mode="after")
    def _loss_can_be_evaluated_again(self) -> Self:
        if not (isinstance(self.task, ImageClassification) and self.task.changes_samples):
            return self
        if isinstance(self.optimizer, NGDOptimizer) and self.optimizer.needs_objective:
            choices = (self.optimizer.length, self.optimizer.damping_rule)
            names = [choice.kind for choice in choices if choice.needs_objective]
            raise ValueError(
                f"optimizer's {' and '.join(names)} compares losses of the same samples, and task.mixup and "
                "task.erasing change the samples each time; leave both out, or set lr and damping yourself"
            )
        return self

    @model_validator(mode="after")
    def _engine_averages(self) -> Self:
        engine, workers = self.engine, self.resources.workers
        if isinstance(engine, Bare) and workers > 1 and self.optimizer.kind != "ngd":
            raise ValueError(
                f"engine bare averages no gradients, and optimizer {self.optimizer.kind} has {workers} workers "
                "(resources.workers): take ddp or fsdp, or leave engine out"
            )
        if self.precision == "fp16" and self.effective_engine.kind not in ("bare", "ddp"):
            raise ValueError(f"precision fp16 is not for engine {self.effective_engine.kind}: take bf16, or engine ddp")
        if problem := self.effective_engine.refuses(self.optimizer):
            raise ValueError(f"optimizer: {problem}")
        kind = self.effective_engine.kind
        if self.transform is not None and (problem := self.transform.refuses(self.optimizer, kind)):
            raise ValueError(f"transform: {problem}")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        workers, setting = self.resources.workers, self.resources.words
        share, rest = divmod(self.batch.global_size, workers)
        if rest or share == 0:
            raise ValueError(
                f"batch.global_size must be a multiple of {setting} ({workers}), got {self.batch.global_size}; the "
                f"nearest are {share * workers} and {(share + 1) * workers}"
            )
        if self.batch.micro_size is not None and share % self.batch.micro_size:
            raise ValueError(
                f"batch.micro_size must divide a worker's share, {share} "
                f"(= batch.global_size {self.batch.global_size} / {setting} {workers}), got {self.batch.micro_size}"
            )
        if self.resources.is_elastic and len(self.sizes) == 1:
            smaller = max(size for size in range(1, workers) if self._divides(size))
            raise ValueError(
                f"resources.min_workers {self.resources.min_workers} and max_workers {workers} leave no number of "
                f"workers but {workers} by which batch.global_size ({self.batch.global_size}) can be divided into "
                f"micro-batches of {self.micro_size}; lower min_workers to {smaller}, or give workers alone"
            )
        return self

    @property
    def effective_engine(self) -> EngineChoice:
        """The engine that drives the model: the chosen one, or the default of optimizer and workers."""
        if self.resources.workers == 1:
            return Bare()
        default = Bare() if self.optimizer.kind == "ngd" else DDP()
        return self.engine or default

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(size for size in self.resources.sizes if self._divides(size))

    def at(self, world_size: int) -> Self:
        fixed = super().at(world_size)
        if not self.resources.is_elastic:
            return fixed
        return fixed._with({"batch": self.batch.model_dump() | {"micro_size": self.micro_size}})

    def _divides(self, size: int) -> bool:
        share, rest = divmod(self.batch.global_size, size)
        return not rest and share % self.micro_size == 0

    @property
    def worker_batch(self) -> int:
        """Samples per optimizer step on one worker."""
        return self.batch.global_size // self.resources.workers

    @property
    def micro_size(self) -> int:
        """Samples per forward pass on one worker."""
        return self.batch.micro_size or self.worker_batch

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimizer step on one worker."""
        return self.worker_batch // self.micro_size


def _listed(sizes: tuple[int, ...]) -> str:
    """Returns "2, 4 or 8", or "2 to 8" if none between is left out."""
    if len(sizes) == sizes[-1] - sizes[0] + 1 > 2:
        return f"{sizes[0]} to {sizes[-1]}"
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))


class OwnMetric(SpecModel):
    """A metric that an own loop reports."""

    better: Literal["higher", "lower"]
    unit: Literal["number", "share"] = Field(default="number", description="share: in [0, 1], shown as per cent.")


def _with_direction(given: object) -> object:
    return {"better": given} if isinstance(given, str) else given


OwnMetricChoice = Annotated[
    OwnMetric, BeforeValidator(_with_direction, json_schema_input_type=Literal["higher", "lower"] | OwnMetric)
]


class OwnLoop(SpecModel):
    """A training loop of the user's own: a function that is called on each rank with a `LoopContext`."""

    function: Function
    options: Options = Field(default={})
    steps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="Steps that the loop will report; None: unknown.",
    )
    metrics: dict[MetricName, OwnMetricChoice] = Field(
        default={"loss": OwnMetric(better="lower")},
        min_length=1,
        max_length=32,
        description="The metrics that the loop reports, the one that counts first, and whether higher or lower is "
        "better; or that and its unit: {better: higher, unit: share}.",
    )


class KeptCheckpoints(SpecModel):
    """The checkpoints of an own loop, which says itself when it saves one."""

    keep: int = Field(default=2, ge=1, le=MAX_STEPS, description="Number of checkpoints kept, the newest ones.")


class LoopSpec(Job):
    """A job of the user's own training loop; the service does everything around it."""

    train: OwnLoop
    init_from: InitFromCheckpoint | None = Field(
        default=None, description="Another job of the same loop, whose state `resume` returns first."
    )
    checkpoint: KeptCheckpoints = KeptCheckpoints()

    @model_validator(mode="after")
    def _takes_everything(self) -> Self:
        if self.init_from is not None and self.init_from.takes != "everything":
            raise ValueError(
                "init_from.takes must be everything in a job with a loop of its own: what it saved is one state"
            )
        return self

    @model_validator(mode="after")
    def _target_is_reported(self) -> Self:
        if self.target is None:
            return self
        metric = self.train.metrics.get(self.target.metric)
        if metric is None:
            raise ValueError(
                f"target.metric must be one of train.metrics, {', '.join(self.train.metrics)}, got "
                f"{self.target.metric!r}; add it there"
            )
        problem = self.target.problem_as_share(self.target.metric) if metric.unit == "share" else None
        if problem is not None:
            raise ValueError(problem)
        return self


AnySpec = JobSpec | LoopSpec


def spec_class(value: object) -> type[AnySpec]:
    """Returns the class that the contents of a job are to be read as: a job with `train` has a loop of its own."""
    return LoopSpec if isinstance(value, dict) and "train" in value else JobSpec


def spec_of_json(text: bytes | str) -> AnySpec:
    """Returns a job that was written as JSON. Raises: pydantic.ValidationError; ValueError for no JSON."""
    return spec_class(json.loads(text)).model_validate_json(text)

"""The course of a job: its length, batches, processes, checkpoints, restarts, target."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ngd_workers.contract.names import MetricName
from ngd_workers.contract.spec.base import MAX_SAMPLES, MAX_STEPS, SpecModel

__all__ = ["Batch", "Checkpoint", "ConstantLR", "Failure", "Loading", "PolynomialLR", "Resources", "Schedule", "Target"]

MAX_WORKERS = 4096


class ConstantLR(SpecModel):
    """The optimizer's lr at every step."""

    kind: Literal["constant"] = "constant"


class PolynomialLR(SpecModel):
    """lr * (1 - (t - start) / (end - start)) ** power between two steps of the run: SP-NGD's schedule ([OT20])."""

    kind: Literal["polynomial"] = "polynomial"
    power: float = Field(default=1.0, gt=0, description="Exponent of the decay; 1: lr falls linearly.")
    start_fraction: float = Field(default=0.0, ge=0, lt=1, description="Share of the run before lr begins to fall.")
    end_fraction: float = Field(
        default=1.0, gt=0, le=10, description="Share of the run at which lr reaches 0; above 1: never within the run."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end_fraction <= self.start_fraction:
            raise ValueError(
                f"end_fraction must be > start_fraction ({self.start_fraction}), got {self.end_fraction}; raise it"
            )
        return self


class Schedule(SpecModel):
    """The length of the training, the course of lr, and the steps that are evaluated."""

    epochs: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Passes over the training data; give either this or steps."
    )
    steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Optimizer steps; give either this or epochs."
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        le=MAX_STEPS,
        description="Steps in which lr rises linearly from lr / warmup_steps; 0: no warm-up.",
    )
    lr: Annotated[ConstantLR | PolynomialLR, Field(discriminator="kind")] = ConstantLR()
    evaluate_every_steps: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="Optimizer steps between evaluations; None: one per epoch. The last step is always evaluated.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs and steps, got epochs={self.epochs} and steps={self.steps}")
        return self


class Batch(SpecModel):
    """The global batch of one optimizer step, divided among the workers and then into micro-batches."""

    global_size: int = Field(ge=1, le=MAX_SAMPLES, description="Samples per optimizer step over all workers.")
    micro_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SAMPLES,
        description="Samples per forward pass on one worker; None: the worker's whole share in one pass, and in an "
        "elastic job that share at max_workers. With fewer workers each makes more passes.",
    )


class Resources(SpecModel):
    """The processes, GPUs and CPUs of the job.

    A job with min_workers and max_workers is *elastic*: on a Ray cluster it runs with as many workers as have room, and
    changes their number when nodes come and go. `workers` is then the largest number, and may be left out.
    """

    workers: int = Field(
        default=1, ge=1, le=MAX_WORKERS, description="Data-parallel processes: the ranks. Elastic: max_workers."
    )
    min_workers: int | None = Field(
        default=None,
        ge=1,
        le=MAX_WORKERS,
        description="Fewest workers of an elastic job; with less room it waits. None: the number is fixed.",
    )
    max_workers: int | None = Field(
        default=None, ge=1, le=MAX_WORKERS, description="Most workers of an elastic job. None: the number is fixed."
    )
    gpus_per_worker: int = Field(
        default=0, ge=0, le=1, description="GPUs of each worker. 0: CPU and gloo; 1: CUDA and NCCL."
    )
    threads_per_worker: int = Field(
        default=1, ge=1, le=256, description="Threads of torch in each worker, and CPUs reserved for it."
    )

    @model_validator(mode="before")
    @classmethod
    def _workers_follow(cls, given: object) -> object:
        if not isinstance(given, dict) or "workers" in given:
            return given
        most = given.get("max_workers")
        return given | {"workers": most} if isinstance(most, int) and 1 <= most <= MAX_WORKERS else given

    @model_validator(mode="after")
    def _range_holds(self) -> Self:
        least, most = self.min_workers, self.max_workers
        if least is None and most is None:
            return self
        if least is None or most is None:
            missing, given = ("min_workers", most) if least is None else ("max_workers", least)
            other = "max_workers" if least is None else "min_workers"
            raise ValueError(f"{other} is {given} and {missing} is left out; give both, or workers alone")
        if least >= most:
            raise ValueError(
                f"min_workers must be < max_workers ({most}), got {least}; for a number that stays give workers alone"
            )
        if self.workers != most:
            raise ValueError(
                f"workers must be max_workers ({most}) in an elastic job, got {self.workers}; leave it out, or give "
                f"{most}"
            )
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.max_workers is not None

    @property
    def sizes(self) -> range:
        """The numbers of workers in the range, whether or not the batch can be divided among so many."""
        return range(self.min_workers or self.workers, self.workers + 1)

    @property
    def words(self) -> str:
        """The setting that says how many workers there are at most, for a message."""
        return f"resources.{'max_workers' if self.is_elastic else 'workers'}"


class Checkpoint(SpecModel):
    """How often the job saves its state, from which it resumes after a crash."""

    every_steps: int = Field(
        default=50,
        ge=1,
        le=MAX_STEPS,
        description="Optimizer steps between checkpoints; the last step is always saved.",
    )
    keep: int = Field(default=2, ge=1, le=MAX_STEPS, description="Number of checkpoints kept, the newest ones.")


class Failure(SpecModel):
    """How often a job starts again after its workers or its driver died."""

    worker_restarts: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Restarts of the worker group within one attempt. A single worker without Ray runs inside the "
        "driver: an error restarts it, its death ends the attempt.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Attempts whose workers have begun; NGD_MAX_FAILED_STARTS limits the others.",
    )


class Loading(SpecModel):
    """How each worker reads its samples."""

    processes: int = Field(
        default=0, ge=0, le=256, description="Processes per worker that read and prepare samples; 0: the worker itself."
    )
    prefetch: int = Field(default=2, ge=1, le=1024, description="Micro-batches that each process prepares ahead.")


class Target(SpecModel):
    """The result that the job should reach; the service records the first evaluated step that reaches it."""

    metric: MetricName = Field(description="A metric of the task on the test data: accuracy, perplexity, loss ...")
    value: float = Field(description="The bound: the task says whether the metric should be above it or below.")
    stop: Literal[True, False] = Field(
        default=False, description="Whether the job ends, as a success, when it reaches the target."
    )

    def problem_as_share(self, label: str) -> str | None:
        """Returns the reason why the value is no share, such as accuracy is; None: it may be one."""
        if 0 <= self.value <= 1:
            return None
        return f"target.value must be in [0, 1] for {label}, a share, got {self.value:g}; divide by 100?"

    @model_validator(mode="before")
    @classmethod
    def _of_one_metric(cls, given: object) -> object:
        """Takes {test_<metric>: value}, too: the form of version 0.1, which stored jobs have."""
        if isinstance(given, dict) and "metric" not in given:
            names = [name for name in given if isinstance(name, str) and name.startswith("test_")]
            if len(names) == 1:
                rest = {name: value for name, value in given.items() if name != names[0]}
                return rest | {"metric": names[0].removeprefix("test_"), "value": given[names[0]]}
        return given

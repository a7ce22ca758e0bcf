"""The contents of a job: the JobSpec and every choice under it. Imports without torch.

One file is the body of ``POST /api/v1/jobs``, the argument of ``ngd submit`` and ``ngd train``, or a recipe.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ngd_dist.config import Categorical, Empirical, NGDConfig, QuadraticModel, Single

__all__ = ["JobSpec"]

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"  # RFC 1035 label
FUNCTION_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
MAX_DEPTH = 16
MAX_INT = 2**63 - 1
MAX_STEPS = 1_000_000_000  # eleven days at a step per millisecond
MAX_SAMPLES = 1_000_000_000  # in a batch


def _json_value(value: object, where: str = "options", depth: int = 0) -> object:
    """Returns the value if JSON and a database can hold it as it is. Raises: ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError(f"values may lie {MAX_DEPTH} levels deep, and one lies deeper; flatten them")
    match value:
        case None | bool():
            pass
        case int() if abs(value) > MAX_INT:
            raise ValueError(f"{where} must fit in 64 bits; give it as a text")
        case float() if not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number, got {value}")
        case int() | float():
            pass
        case str():
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"{where} must be valid Unicode, got {value!a}")
        case list():
            for index, item in enumerate(value):
                _json_value(item, f"{where}[{index}]", depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{where} must have texts as names, got {key!r}; quote it")
                _json_value(key, f"a name in {where}", depth + 1)
                _json_value(item, f"{where}.{key}", depth + 1)
        case _:
            kinds = "a text, a finite number, true, false, null, a list or an object"
            raise ValueError(f"{where} must be {kinds}, got a {type(value).__name__}")
    return value


Options = Annotated[
    dict[str, Any], BeforeValidator(_json_value), Field(description="Keyword arguments passed to the function.")
]


class SpecModel(BaseModel):
    """Base of every part of a spec: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SmallCNN(SpecModel):
    """Three 3x3 convolutions with batch norm and ReLU, two poolings and one hidden linear layer."""

    kind: Literal["small_cnn"] = "small_cnn"
    channels: int = Field(
        default=16, ge=1, le=1024, description="Channels of the first convolution; the other two have twice as many."
    )
    hidden: int = Field(default=64, ge=1, le=16384, description="Units of the hidden linear layer.")


class MLP(SpecModel):
    """Linear layers with ReLU between them."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),  # YAML has no tuples
        Field(description="Units of each hidden layer, in order."),
    ] = (128,)


class UserModel(SpecModel):
    """The user's own `package.module:function`, called with the data's shape; it must return a `torch.nn.Module`."""

    kind: Literal["function"] = "function"
    function: str = Field(
        pattern=FUNCTION_PATTERN, description="package.module:function; the workers must be able to import it."
    )
    options: Options = {}


class Digits(SpecModel):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8, 10 classes; they ship with the package."""

    kind: Literal["digits"] = "digits"
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share of the images held out for the test; seed 0 draws the split."
    )


class IDX(SpecModel):
    """Images and labels in the four IDX files of MNIST and its relatives (Fashion-MNIST), plain or gzipped."""

    kind: Literal["idx"] = "idx"
    directory: str = Field(
        description="Folder with the four files; a relative path starts at NGD_DATA_DIR or --data-dir."
    )
    mean: float = Field(default=0.0, description="Number subtracted from the pixels, which are in [0, 1].")
    std: float = Field(default=1.0, gt=0, description="Divisor of the pixels, after the mean is subtracted.")


class UserData(SpecModel):
    """The user's own `package.module:function`; it must return a `ngd_workers.data.Dataset`."""

    kind: Literal["function"] = "function"
    function: str = Field(
        pattern=FUNCTION_PATTERN, description="package.module:function; the workers must be able to import it."
    )
    options: Options = {}


class NGDOptimizer(NGDConfig):
    """SP-NGD, by `ngd_dist.NGD`. `micro_batches`, `loss_reduction` and `batch_dim` follow from the job."""

    kind: Literal["ngd"] = "ngd"

    @field_validator("exclude", mode="before")
    @classmethod
    def _list_is_tuple(cls, given: object) -> object:
        return tuple(given) if isinstance(given, list) else given  # neither YAML nor JSON has tuples

    @model_validator(mode="after")
    def _loop_owns_accumulation(self) -> Self:
        if self.micro_batches != 1 or self.loss_reduction != "mean":
            raise ValueError(
                "micro_batches and loss_reduction follow from batch.global_size and batch.micro_size in a job; "
                "leave them out of optimizer"
            )
        if self.batch_dim != 0:
            raise ValueError(
                f"batch_dim must be 0 in a job, whose images are counted by dimension 0, got {self.batch_dim}; leave "
                "it out of optimizer"
            )
        return self

    @model_validator(mode="after")
    def _fisher_is_that_of_the_loss(self) -> Self:
        likelihood = Categorical() if isinstance(self.fisher, Empirical) else self.fisher.likelihood
        if not isinstance(likelihood, Categorical):
            raise ValueError(
                f"fisher.likelihood must be categorical in a job, whose loss is the cross-entropy of one class, got "
                f"{likelihood.kind}; leave it out"
            )
        if likelihood.class_dim not in (-1, 1):
            raise ValueError(
                f"fisher.likelihood.class_dim must be 1 or -1 in a job, whose models return one logit per class, got "
                f"{likelihood.class_dim}; leave it out"
            )
        return self

    def config(self, *, micro_batches: int) -> NGDConfig:
        """Returns the optimizer's configuration. micro_batches: forward passes per optimizer step, at least 1."""
        return self.model_copy(update={"micro_batches": micro_batches})

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out lr and momentum if the quadratic model chooses them: a spec that sets them too is refused."""
        content: dict[str, Any] = handler(self)
        unread = {"lr", "momentum"} if isinstance(self.length, QuadraticModel) else set()
        return {name: value for name, value in content.items() if name not in unread}


class SGD(SpecModel):
    """torch.optim.SGD."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0, description="Learning rate, before the schedule's factor.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Weight of the earlier steps; 0: no momentum.")
    weight_decay: float = Field(default=0.0, ge=0, description="Multiple of the weights added to their gradient.")
    nesterov: Literal[True, False] = Field(default=False, description="Nesterov's momentum; needs momentum > 0.")

    @model_validator(mode="after")
    def _has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got 0: raise momentum, or leave nesterov out")
        return self


class AdamW(SpecModel):
    """torch.optim.AdamW."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="Learning rate, before the schedule's factor.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the divisor of a step, against division by 0.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Share of the weights, times lr, taken off in each step."
    )


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
        description="Samples per forward pass on one worker; None: the worker's whole share in one pass.",
    )


class Resources(SpecModel):
    """The processes, GPUs and CPUs of the job."""

    workers: int = Field(default=1, ge=1, le=4096, description="Data-parallel processes: the ranks.")
    gpus_per_worker: int = Field(
        default=0, ge=0, le=1, description="GPUs of each worker. 0: CPU and gloo; 1: CUDA and NCCL."
    )
    threads_per_worker: int = Field(
        default=1, ge=1, le=256, description="Threads of torch in each worker, and CPUs reserved for it."
    )


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


class Target(SpecModel):
    """The result that the job should reach; the service records the first evaluated step that reaches it."""

    test_accuracy: float = Field(gt=0, le=1, description="Share of the test data classified correctly.")
    stop: Literal[True, False] = Field(
        default=False, description="Whether the job ends, as a success, when it reaches the target."
    )


class JobSpec(SpecModel):
    """A whole job. The same spec gives the same result with the same versions of the libraries."""

    name: str = Field(pattern=NAME_PATTERN, description="Lower-case letters, digits and hyphens, at most 63 in all.")
    model: Annotated[SmallCNN | MLP | UserModel, Field(discriminator="kind")]
    data: Annotated[Digits | IDX | UserData, Field(discriminator="kind")]
    optimizer: Annotated[NGDOptimizer | SGD | AdamW, Field(discriminator="kind")]
    schedule: Schedule
    batch: Batch
    resources: Resources = Resources()
    checkpoint: Checkpoint = Checkpoint()
    failure: Failure = Failure()
    target: Target | None = None
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the first weights, of the order of samples and of dropout."
    )

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
    def _batch_divides(self) -> Self:
        share, rest = divmod(self.batch.global_size, self.resources.workers)
        if rest or share == 0:
            raise ValueError(
                f"batch.global_size must be a multiple of resources.workers ({self.resources.workers}), "
                f"got {self.batch.global_size}; the nearest are {share * self.resources.workers} and "
                f"{(share + 1) * self.resources.workers}"
            )
        if self.batch.micro_size is not None and share % self.batch.micro_size:
            raise ValueError(
                f"batch.micro_size must divide a worker's share, {share} "
                f"(= batch.global_size {self.batch.global_size} / resources.workers {self.resources.workers}), "
                f"got {self.batch.micro_size}"
            )
        return self

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

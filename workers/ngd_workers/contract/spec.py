"""What a job may contain: the JobSpec and every choice under it. Imports without torch.

The same file is the body of ``POST /api/v1/jobs``, the argument of ``ngd submit`` and ``ngd train``, and a recipe.
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
MAX_STEPS = 1_000_000_000  # a job of a step each millisecond takes eleven days for them
MAX_SAMPLES = 1_000_000_000  # of a batch


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


# --- models -----------------------------------------------------------------------------------------------------------


class SmallCNN(SpecModel):
    """Three 3x3 convolutions with batch norm, two poolings, one hidden linear layer."""

    kind: Literal["small_cnn"] = "small_cnn"
    channels: int = Field(
        default=16, ge=1, le=1024, description="Width of the first convolution; the others have twice that."
    )
    hidden: int = Field(default=64, ge=1, le=16384, description="Units of the hidden linear layer.")


class MLP(SpecModel):
    """Linear layers with ReLU between them."""

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...],
        BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),  # YAML has no tuples
        Field(description="Units of each hidden layer."),
    ] = (128,)


class UserModel(SpecModel):
    """The user's own `package.module:function`, called with the data's shape; it must return a `torch.nn.Module`."""

    kind: Literal["function"] = "function"
    function: str = Field(pattern=FUNCTION_PATTERN, description="package.module:function, importable by the workers.")
    options: Options = {}


# --- data -------------------------------------------------------------------------------------------------------------


class Digits(SpecModel):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8, 10 classes; they ship with the package."""

    kind: Literal["digits"] = "digits"
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Share held out for the test, drawn with the seed 0."
    )


class IDX(SpecModel):
    """Images and labels in the four IDX files of MNIST and its relatives (Fashion-MNIST), plain or gzipped."""

    kind: Literal["idx"] = "idx"
    directory: str = Field(description="Folder with the four files; a relative one is below the data directory.")
    mean: float = Field(default=0.0, description="Subtracted from pixels in [0, 1].")
    std: float = Field(default=1.0, gt=0, description="Pixels are divided by this after the mean is subtracted.")


class UserData(SpecModel):
    """The user's own `package.module:function`; it must return a `ngd_workers.data.Dataset`."""

    kind: Literal["function"] = "function"
    function: str = Field(pattern=FUNCTION_PATTERN, description="package.module:function, importable by the workers.")
    options: Options = {}


# --- optimizer, schedule ----------------------------------------------------------------------------------------------


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
        """Returns the optimizer's configuration. micro_batches: of the job's batch, at least 1."""
        return self.model_copy(update={"micro_batches": micro_batches})

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out lr and momentum where the quadratic model chooses them: read again, they would contradict it."""
        content: dict[str, Any] = handler(self)
        unread = {"lr", "momentum"} if isinstance(self.length, QuadraticModel) else set()
        return {name: value for name, value in content.items() if name not in unread}


class SGD(SpecModel):
    """torch.optim.SGD."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    nesterov: Literal[True, False] = False


class AdamW(SpecModel):
    """torch.optim.AdamW."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)


class ConstantLR(SpecModel):
    """The optimizer's lr at every step."""

    kind: Literal["constant"] = "constant"


class PolynomialLR(SpecModel):
    """lr * (1 - (t - start) / (end - start)) ** power between two steps of the run: SP-NGD's schedule ([OT20])."""

    kind: Literal["polynomial"] = "polynomial"
    power: float = Field(default=1.0, gt=0)
    start_fraction: float = Field(default=0.0, ge=0, lt=1, description="Share of the run with the full lr.")
    end_fraction: float = Field(
        default=1.0, gt=0, le=10, description="Where lr reaches 0; above 1: after the run's end."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end_fraction <= self.start_fraction:
            raise ValueError(
                f"end_fraction must be > start_fraction ({self.start_fraction}), got {self.end_fraction}; raise it"
            )
        return self


class Schedule(SpecModel):
    """How long the job trains and what changes meanwhile."""

    epochs: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Passes over the training data; give this or steps."
    )
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="Optimizer steps; give this or epochs.")
    warmup_steps: int = Field(
        default=0, ge=0, le=MAX_STEPS, description="lr rises linearly from lr / warmup_steps over this many steps."
    )
    lr: Annotated[ConstantLR | PolynomialLR, Field(discriminator="kind")] = ConstantLR()
    evaluate_every_steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="None: once an epoch. The last step always is."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give exactly one of epochs and steps, got epochs={self.epochs} and steps={self.steps}")
        return self


# --- the run ----------------------------------------------------------------------------------------------------------


class Batch(SpecModel):
    """The global batch of one optimizer step and how it is cut: workers first, then micro-batches."""

    global_size: int = Field(ge=1, le=MAX_SAMPLES, description="Samples per optimizer step over all workers.")
    micro_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SAMPLES,
        description="Samples per forward pass on one worker; None: the worker's whole share at once.",
    )


class Resources(SpecModel):
    """What the job asks of the cluster."""

    workers: int = Field(default=1, ge=1, le=4096, description="Data-parallel processes.")
    gpus_per_worker: int = Field(default=0, ge=0, le=1, description="0: CPU and gloo; 1: CUDA and NCCL.")
    threads_per_worker: int = Field(
        default=1, ge=1, le=256, description="CPU threads of torch, and CPUs reserved, per worker."
    )


class Checkpoint(SpecModel):
    """When the job saves what it needs to go on after a crash."""

    every_steps: int = Field(
        default=50, ge=1, le=MAX_STEPS, description="Optimizer steps between checkpoints; the last step always is one."
    )
    keep: int = Field(default=2, ge=1, le=MAX_STEPS, description="Newest checkpoints kept.")


class Failure(SpecModel):
    """How often a job is tried again after its workers or its driver died."""

    worker_restarts: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Restarts of the worker group within one attempt. A single worker without Ray is the driver: it is "
        "started again after an error, and its death ends the attempt.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Attempts of the whole job whose workers have begun; others are counted apart.",
    )


class Target(SpecModel):
    """The result that the job is expected to reach; its first step at the target is recorded."""

    test_accuracy: float = Field(gt=0, le=1)
    stop: Literal[True, False] = Field(
        default=False, description="End the job, successfully, when the target is reached."
    )


class JobSpec(SpecModel):
    """A whole job. Reproducible from this alone: same spec, same seed, same versions, same result."""

    name: str = Field(pattern=NAME_PATTERN, description="Lower-case letters, digits and hyphens; at most 63.")
    model: Annotated[SmallCNN | MLP | UserModel, Field(discriminator="kind")]
    data: Annotated[Digits | IDX | UserData, Field(discriminator="kind")]
    optimizer: Annotated[NGDOptimizer | SGD | AdamW, Field(discriminator="kind")]
    schedule: Schedule
    batch: Batch
    resources: Resources = Resources()
    checkpoint: Checkpoint = Checkpoint()
    failure: Failure = Failure()
    target: Target | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)

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

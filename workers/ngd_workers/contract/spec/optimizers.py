"""The optimizers that a job may use: `ngd`, and those that it is compared with."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ngd_dist.config import Categorical, Empirical, LikelihoodChoice, NGDConfig
from ngd_workers.contract.spec.base import SpecModel, list_to_tuple

__all__ = ["LAMB", "LARS", "SGD", "SOAP", "AdamW", "Muon", "NGDOptimizer", "OptimizerChoice", "Plain", "Shampoo"]


class NGDOptimizer(NGDConfig):
    """SP-NGD, by `ngd_dist.NGD`. `micro_batches`, `loss_reduction` and `batch_dim` follow from the job."""

    kind: Literal["ngd"] = "ngd"
    objective_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the samples of each micro-batch on which step_length quadratic_model and damping_rule "
        "levenberg_marquardt evaluate the loss again, evenly spaced and at least one; the gradient is of all samples.",
    )

    @field_validator("exclude", mode="before")
    @classmethod
    def _list_is_tuple(cls, given: object) -> object:
        return list_to_tuple(given)

    @model_validator(mode="after")
    def _loop_owns_accumulation(self) -> Self:
        if self.micro_batches != 1 or self.loss_reduction != "mean":
            raise ValueError(
                "micro_batches and loss_reduction follow from batch.global_size and batch.micro_size in a job; "
                "leave them out of optimizer"
            )
        if self.batch_dim != 0:
            raise ValueError(
                f"batch_dim must be 0 in a job, whose samples are counted by dimension 0, got {self.batch_dim}; leave "
                "it out of optimizer"
            )
        return self

    @model_validator(mode="after")
    def _objective_is_evaluated(self) -> Self:
        if self.objective_fraction < 1 and not self.needs_objective:
            raise ValueError(
                f"objective_fraction {self.objective_fraction:g} is read by step_length quadratic_model and by "
                "damping_rule levenberg_marquardt alone: take one of them, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _task_owns_likelihood(self) -> Self:
        if not isinstance(self.fisher, Empirical) and self.fisher.likelihood != Categorical():
            raise ValueError(
                f"fisher.likelihood follows from the task in a job, got {self.fisher.likelihood.kind}; leave it out"
            )
        if isinstance(self.fisher, Empirical) and self.fisher.class_dim != -1:
            raise ValueError(
                f"fisher.class_dim follows from the task in a job, got {self.fisher.class_dim}; leave it out"
            )
        return self

    def config(self, *, micro_batches: int, likelihood: LikelihoodChoice) -> NGDConfig:
        """Returns the optimizer's configuration.

        micro_batches: forward passes per optimizer step, at least 1. likelihood: that of a label in the task.
        """
        update: dict[str, Any] = {"likelihood": likelihood}
        if isinstance(self.fisher, Empirical):
            update = {"class_dim": likelihood.class_dim if isinstance(likelihood, Categorical) else -1}
        fisher = self.fisher.model_copy(update=update)
        return self.model_copy(update={"micro_batches": micro_batches, "fisher": fisher})


class Plain(SpecModel):
    """Base of the optimizers that are not ours. Every one of them trains under engines bare and ddp.

    reads_whole: what the optimizer reads of a whole weight, so that no engine may leave a worker a part of it; None:
    the optimizer works on each number by itself. gathers: whether it gathers whole weights itself where FSDP2 has cut
    them. shapes_state: the settings on which the shapes of its state depend.
    keeps_moments_alone: whether it keeps nothing of a weight but means of gradients and of their squares, so that
    training can go over to other coordinates.
    """

    kind: str

    reads_whole: ClassVar[str | None] = None
    gathers: ClassVar[bool] = False
    keeps_moments_alone: ClassVar[bool] = True
    shapes_state: ClassVar[frozenset[str]] = frozenset()

    @property
    def state_per_weight(self) -> int | None:
        """Numbers that it keeps for each weight; None: more than that, which the planner can't count."""
        return None


class SGD(Plain):
    """torch.optim.SGD."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0, description="Learning rate, before the schedule's factor.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Weight of the earlier steps; 0: no momentum.")
    weight_decay: float = Field(default=0.0, ge=0, description="Multiple of the weights added to their gradient.")
    nesterov: Literal[True, False] = Field(default=False, description="Nesterov's momentum; needs momentum > 0.")

    @property
    def state_per_weight(self) -> int:
        return int(self.momentum > 0)

    @model_validator(mode="after")
    def _has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got 0: raise momentum, or leave nesterov out")
        return self


class AdamW(Plain):
    """torch.optim.AdamW."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="Learning rate, before the schedule's factor.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the divisor of a step, against division by 0.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Share of the weights, times lr, taken off in each step."
    )

    @property
    def state_per_weight(self) -> int:
        return 2


class LARS(Plain):
    """LARS (arXiv 1708.03888), by pytorch_optimizer: SGD whose step in a layer is in proportion to the layer's norm.

    Biases and norms take plain steps of SGD, with no decay.
    """

    reads_whole = "divides norms of whole weights and gradients"

    kind: Literal["lars"] = "lars"
    lr: float = Field(
        default=1.0,
        gt=0,
        description="Learning rate, before the schedule's factor. Times trust_coefficient it is the share of its norm "
        "by which a layer moves in a step, so that it is far above SGD's; it is also the rate of biases and norms.",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Weight of the earlier steps; 0: no momentum.")
    weight_decay: float = Field(default=5e-4, ge=0, description="Multiple of the weights added to their gradient.")
    trust_coefficient: float = Field(
        default=1e-3, gt=0, description="The step of a layer, as a share of its norm, at lr 1 and without momentum."
    )

    @property
    def state_per_weight(self) -> int:
        return int(self.momentum > 0)


class LAMB(Plain):
    """LAMB (arXiv 1904.00962), by pytorch_optimizer: Adam whose step in a layer is in proportion to the layer's norm.

    The norm counts up to 10, and the decay is part of the step that is scaled, as in the paper.
    """

    reads_whole = "divides norms of whole weights and steps"

    kind: Literal["lamb"] = "lamb"
    lr: float = Field(default=1e-3, gt=0, description="Learning rate, before the schedule's factor.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients.")
    eps: float = Field(default=1e-6, gt=0, description="Added to the divisor of a step, against division by 0.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Multiple of the weights added to a step before the step is scaled."
    )

    @property
    def state_per_weight(self) -> int:
        return 2


class Muon(Plain):
    """Muon (Keller Jordan), by pytorch_optimizer: momentum made orthogonal, for hidden matrices; AdamW for the rest.

    A hidden matrix is a parameter of two dimensions or more whose own name contains "weight", but for those of
    embeddings, and the first and the last one of the model. A kernel of a convolution counts as the matrix
    [outputs, inputs times positions]. A model without a hidden matrix is refused when the job starts.
    """

    reads_whole = "makes whole matrices orthogonal"
    gathers = True

    kind: Literal["muon"] = "muon"
    lr: float = Field(
        default=0.02,
        gt=0,
        description="Learning rate of hidden matrices, before the schedule's factor. The step of a matrix with more "
        "rows than columns is longer, by the root of their ratio.",
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Decay of the mean of gradients.")
    nesterov: Literal[True, False] = Field(default=True, description="Nesterov's momentum.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Share of hidden matrices, times lr, taken off in each step."
    )
    ns_steps: int = Field(default=5, ge=1, le=20, description="Newton-Schulz iterations, in bfloat16.")
    adamw_lr: float = Field(
        default=3e-4, gt=0, description="Learning rate of the rest, before the schedule's factor, which is lr's."
    )
    adamw_beta1: float = Field(default=0.9, ge=0, lt=1, description="Of the rest: decay of the mean of gradients.")
    adamw_beta2: float = Field(
        default=0.95, ge=0, lt=1, description="Of the rest: decay of the mean of squared gradients."
    )
    adamw_eps: float = Field(default=1e-10, gt=0, description="Of the rest: added to the divisor of a step.")
    adamw_weight_decay: float = Field(
        default=0.0, ge=0, description="Share of the rest, times adamw_lr, taken off in each step."
    )


class SOAP(Plain):
    """SOAP (arXiv 2409.11321), by pytorch_optimizer: Adam in the eigenbasis of Shampoo's statistics.

    The first gradient makes the basis and moves nothing. Biases and norms are trained by Adam.
    """

    reads_whole = "rotates whole gradients"
    keeps_moments_alone = False
    shapes_state = frozenset({"max_precondition_dim"})

    kind: Literal["soap"] = "soap"
    lr: float = Field(default=3e-3, gt=0, description="Learning rate, before the schedule's factor.")
    beta1: float = Field(default=0.95, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(
        default=0.95, ge=0, lt=1, description="Decay of the mean of squared gradients, and of the statistics."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the divisor of a step, against division by 0.")
    weight_decay: float = Field(
        default=0.01, ge=0, description="Share of the weights, times lr, taken off in each step."
    )
    precondition_frequency: int = Field(default=10, ge=1, description="Steps between two updates of the eigenbasis.")
    max_precondition_dim: int = Field(
        default=10_000, ge=1, description="Longest dimension that is rotated; a longer one keeps its axes."
    )


class Shampoo(Plain):
    """Shampoo (arXiv 1802.09568 and 2002.09018), by pytorch_optimizer: inverse roots of the statistics of each axis.

    A step has the length of SGD's in each layer. Defaults are those of the authors' distributed_shampoo.
    """

    reads_whole = "multiplies whole gradients by inverse roots"
    keeps_moments_alone = False
    shapes_state = frozenset({"block_size"})

    kind: Literal["shampoo"] = "shampoo"
    lr: float = Field(default=0.1, gt=0, description="Learning rate, before the schedule's factor; SGD's is a start.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Weight of the earlier steps.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the statistics.")
    nesterov: Literal[True, False] = Field(default=True, description="Nesterov's momentum.")
    weight_decay: float = Field(default=0.0, ge=0, description="Multiple of the weights added to a step.")
    matrix_eps: float = Field(
        default=1e-6, gt=0, description="Damping of an inverse root, as a share of the largest eigenvalue."
    )
    start_preconditioning_step: int = Field(default=5, ge=1, description="First step that is not SGD's.")
    preconditioning_compute_steps: int = Field(
        default=1, ge=1, description="Steps between two computations of the inverse roots, the most expensive part."
    )
    block_size: int = Field(
        default=128, ge=2, description="Longest block: a longer axis is cut into several, each with its own statistics."
    )


OptimizerChoice = Annotated[
    NGDOptimizer | SGD | AdamW | LARS | LAMB | Muon | SOAP | Shampoo, Field(discriminator="kind")
]

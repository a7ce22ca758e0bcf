"""The optimizers that a job may use."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ngd_dist.config import Categorical, Empirical, LikelihoodChoice, NGDConfig, QuadraticModel
from ngd_workers.contract.spec.base import SpecModel, list_to_tuple

__all__ = ["SGD", "AdamW", "NGDOptimizer", "OptimizerChoice"]


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


OptimizerChoice = Annotated[NGDOptimizer | SGD | AdamW, Field(discriminator="kind")]

"""The engines that may drive a job's model: they average gradients, and may shard weights and optimizer state."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ngd_dist.config.deepspeed import check_deepspeed, refusal_at_stage
from ngd_dist.config.pieces import refusal_of_pieces
from ngd_workers.contract.spec.base import Options, SpecModel
from ngd_workers.contract.spec.optimizers import NGDOptimizer, OptimizerChoice, Plain

__all__ = ["DDP", "FSDP", "Bare", "DeepSpeed", "EngineChoice", "Precision"]


class Bare(SpecModel):
    """The model as it is; under optimizer ngd the optimizer averages gradients, and no engine does."""

    kind: Literal["bare"] = "bare"

    def refuses(self, optimizer: OptimizerChoice) -> str | None:
        """Returns the reason why the optimizer can't work with its settings here; None: it can."""
        return None


class DDP(SpecModel):
    """torch's DistributedDataParallel, which averages gradients while backward runs."""

    kind: Literal["ddp"] = "ddp"

    def refuses(self, optimizer: OptimizerChoice) -> str | None:
        """As `Bare.refuses`."""
        return None


class FSDP(SpecModel):
    """torch's FSDP2, `fully_shard`: each worker holds a part of the weights, the gradients and the momentum."""

    kind: Literal["fsdp"] = "fsdp"
    reshard_after_forward: Literal[True, False] = Field(
        default=True,
        description="Whether a block's whole weights are given up after its forward pass and gathered again for its "
        "backward pass; false keeps them: more memory, fewer bytes.",
    )

    def refuses(self, optimizer: OptimizerChoice) -> str | None:
        """As `Bare.refuses`."""
        if isinstance(optimizer, NGDOptimizer):
            return refusal_of_pieces(optimizer, "engine fsdp")
        return None if optimizer.gathers else _refusal_of_parts(optimizer, "engine fsdp")


class DeepSpeed(SpecModel):
    """DeepSpeed's ZeRO, in float32: a worker holds a part of the optimizer's state, gradients and weights."""

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="What is divided among the workers. 1: the optimizer's state; 2: gradients too; 3: weights too; "
        "0: nothing.",
    )
    config: Options = Field(
        default={},
        description="More of DeepSpeed's JSON configuration; keys that other parts of the job decide are refused.",
    )

    @model_validator(mode="after")
    def _keys_are_its_own(self) -> Self:
        problems = check_deepspeed(self.config)
        zero = self.config.get("zero_optimization")
        if isinstance(zero, dict) and "stage" in zero:
            problems.append("zero_optimization.stage must be left out: engine.stage decides it")
        if problems:
            raise ValueError("config: " + "; ".join(problems))
        return self

    def refuses(self, optimizer: OptimizerChoice) -> str | None:
        """As `Bare.refuses`."""
        if isinstance(optimizer, NGDOptimizer):
            return refusal_at_stage(optimizer, self.stage, "engine deepspeed")
        return _refusal_of_parts(optimizer, f"engine deepspeed at stage {self.stage}") if self.stage else None

    def settings(self, *, global_size: int, micro_size: int, micro_batches: int) -> dict[str, Any]:
        """Returns DeepSpeed's configuration of a job. global_size, micro_size: samples."""
        zero = {**(self.config.get("zero_optimization") or {}), "stage": self.stage}
        sizes = {
            "train_batch_size": global_size,
            "train_micro_batch_size_per_gpu": micro_size,
            "gradient_accumulation_steps": micro_batches,
        }
        return {**self.config, **sizes, "zero_optimization": zero}


def _refusal_of_parts(optimizer: Plain, engine: str) -> str | None:
    """Returns the reason why an optimizer can't work where each worker holds a part of every weight; None: it can."""
    if optimizer.reads_whole is None:
        return None
    return (
        f"{optimizer.kind} {optimizer.reads_whole}, and {engine} leaves each worker a part of them: take engine ddp, "
        "or optimizer sgd, adamw or ngd"
    )


EngineChoice = Annotated[Bare | DDP | FSDP | DeepSpeed, Field(discriminator="kind")]
Precision = Literal["fp32", "bf16", "fp16"]

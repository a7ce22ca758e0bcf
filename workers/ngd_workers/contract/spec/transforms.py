"""The methods that change a job's model for training, and give it back plain."""

from typing import Literal

from pydantic import field_validator

from ngd_dist.config import SNGDConfig
from ngd_workers.contract.spec.base import list_to_tuple
from ngd_workers.contract.spec.optimizers import NGDOptimizer, OptimizerChoice

__all__ = ["SNGDTransform", "TransformChoice"]

WHOLE = ("bare", "ddp")  # engines that leave weights whole, and step by the job's optimizer


class SNGDTransform(SNGDConfig):
    """Structured natural gradient (arXiv 2412.07441), by `ngd_dist.transforms.SNGD`, under a plain optimizer.

    Checkpoints, downloads and exports have plain weights.
    """

    @field_validator("exclude", mode="before")
    @classmethod
    def _list_is_tuple(cls, given: object) -> object:
        return list_to_tuple(given)

    def refuses(self, optimizer: OptimizerChoice, engine: Literal["bare", "ddp", "fsdp", "deepspeed"]) -> str | None:
        """Returns the reason why it can't train under this optimizer and engine; None: it can."""
        plain = "take optimizer sgd, adamw, lars, lamb or muon"
        if isinstance(optimizer, NGDOptimizer):
            return f"sngd makes steps natural by itself, and optimizer ngd would again: {plain}, or leave transform out"
        if not optimizer.keeps_moments_alone:
            return f"sngd can't take the state of optimizer {optimizer.kind} to other coordinates: {plain}"
        if engine not in WHOLE:
            return f"sngd multiplies whole weights, and engine {engine} leaves a worker a part of each: take engine ddp"
        return None


TransformChoice = SNGDTransform

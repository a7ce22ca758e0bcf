"""The engines that may drive a job's model: they average gradients, and may shard weights and optimizer state."""

from typing import Annotated, Literal

from pydantic import Field

from ngd_workers.contract.spec.base import SpecModel

__all__ = ["DDP", "FSDP", "Bare", "EngineChoice", "Precision"]


class Bare(SpecModel):
    """The model as it is; under optimizer ngd the optimizer averages gradients, and no engine does."""

    kind: Literal["bare"] = "bare"


class DDP(SpecModel):
    """torch's DistributedDataParallel, which averages gradients while backward runs."""

    kind: Literal["ddp"] = "ddp"


class FSDP(SpecModel):
    """torch's FSDP2, `fully_shard`: each worker holds a part of the weights, the gradients and the momentum."""

    kind: Literal["fsdp"] = "fsdp"
    reshard_after_forward: Literal[True, False] = Field(
        default=True,
        description="Whether a block's whole weights are given up after its forward pass and gathered again for its "
        "backward pass; false keeps them: more memory, fewer bytes.",
    )


EngineChoice = Annotated[Bare | DDP | FSDP, Field(discriminator="kind")]
Precision = Literal["fp32", "bf16", "fp16"]

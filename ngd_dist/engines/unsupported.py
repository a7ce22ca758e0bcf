"""The engines that NGD does not support yet: they shard parameters, and a layer needs whole ones."""

from torch import nn

from ngd_dist.errors import ConfigError

__all__ = ["check_whole"]


def check_whole(model: nn.Module) -> None:
    """Returns if no engine shards the model's parameters. Raises: ConfigError that names it."""
    for module in model.modules():
        if type(module).__module__.startswith("deepspeed.") or type(module).__name__ == "FullyShardedDataParallel":
            raise _unsupported(type(module).__name__)
    for name, p in model.named_parameters():
        # By name, since an import of either takes seconds.
        if type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor":
            raise _unsupported(f"a DTensor ({name}; FSDP2 and tensor parallelism make them)")
        if hasattr(p, "ds_id"):
            raise _unsupported(f"a parameter that DeepSpeed ZeRO 3 has partitioned ({name})")


def _unsupported(name: str) -> ConfigError:
    return ConfigError(
        f"NGD does not support {name}: it needs whole parameters; use the bare model or DistributedDataParallel"
    )

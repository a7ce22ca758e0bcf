"""The keys of a DeepSpeed configuration that the natural gradient can't work with, or that a job owns."""

from collections.abc import Iterator, Mapping
from typing import Any

from ngd_dist.config.ngd import NGDConfig
from ngd_dist.config.pieces import refusal_of_pieces

__all__ = ["OWNED", "check_deepspeed", "refusal_at_stage"]

# By key, the part of a job that decides it.
OWNED = {
    "train_batch_size": "batch.global_size of the job decides it",
    "train_micro_batch_size_per_gpu": "batch of the job decides it",
    "gradient_accumulation_steps": "batch of the job decides it",
    "optimizer": "optimizer of the job decides it",
    "scheduler": "the job's schedules decide it",
    "gradient_clipping": "the job writes 0.0: DeepSpeed would clip before the gradient is natural; set optimizer.clip",
    "zero_allow_untested_optimizer": "the job writes true",
    "zero_force_ds_cpu_optimizer": "the job writes false",
    "checkpoint": "the job writes checkpoints that load at any number of ranks",
    "elasticity": "resources of the job decide it",
    "communication_data_type": "precision of the job decides it",
    "data_types": "precision of the job decides it",
    "dataloader_drop_last": "data of the job decides it",
    "data_efficiency": "data of the job decides it",
    "curriculum_learning": "data of the job decides it",
}
# The same, of keys that are mappings with `enabled`.
OWNED_IF_ENABLED = dict.fromkeys(("fp16", "bf16", "torch_autocast"), "precision of the job decides it")
UNSUPPORTED = {
    "amp": "NVIDIA's amp scales the loss without telling",
    "sparse_gradients": "a layer needs its whole gradient",
    "pipeline": "a stage has layers that the others never see",
    "tensor_parallel": "a layer needs its whole weight",
    "expert_parallel": "a layer needs its whole weight",
    "sequence_parallel_size": "a sample needs all its positions on one rank",
    "autotuning": "it starts the job again by itself",
    "compile": "a compiled engine shows no gradient of a layer",
    "compression_training": "it changes weights behind the optimizer",
    "progressive_layer_drop": "it leaves layers out without telling",
    "eigenvalue": "it differentiates between the passes of a step",
}
UNSUPPORTED_OF_ZERO = {
    "offload_optimizer": "offload is not supported",
    "offload_param": "offload is not supported",
    "cpu_offload": "offload is not supported",
    "cpu_offload_param": "offload is not supported",
    "zenflow": "it steps at moments of its own",
    "zero_quantized_weights": "quantised ZeRO is not supported",
    "zero_quantized_gradients": "quantised ZeRO is not supported",
    "zero_quantized_nontrainable_weights": "quantised ZeRO is not supported",
    "zero_hpz_partition_size": "hierarchical partitions are not supported",
    "mics_shard_size": "hierarchical partitions are not supported",
    "round_robin_gradients": "a rank's range of the parameters would not be one piece",
    "sub_group_size": "the inner optimizer must be called once a step: leave the key out",
}
# Values by which an unsupported part is off.
OFF: tuple[object, ...] = (None, False, "none", "auto")
# The inner optimizer is called once for each group of so many parameters: more than any model has.
MIN_SUB_GROUP_SIZE = 10**9


def check_deepspeed(config: Mapping[str, Any], *, of_job: bool = True) -> list[str]:
    """Returns a sentence for each key of a DeepSpeed configuration that is refused, with the reason; none if it fits.

    config: as DeepSpeed's JSON. of_job: whether a job decides batch, precision and checkpoints, whose keys are then
    refused too; else `gradient_clipping` must be there, and be 0.0.

    >>> check_deepspeed({"zero_optimization": {"stage": 2}})
    []
    >>> check_deepspeed({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    ["zero_optimization.offload_optimizer must be left out, got {'device': 'cpu'}: offload is not supported"]
    """
    return list(_refusals(config, of_job=of_job))


def refusal_at_stage(config: NGDConfig, stage: int, averager: str) -> str | None:
    """Returns the reason, with the way out, why settings of the natural gradient don't fit a stage of ZeRO, or None.

    averager: the name of the engine.

    >>> from ngd_dist.config import MonteCarlo
    >>> refusal_at_stage(NGDConfig(fisher=MonteCarlo()), 2, "ZeRO 2") is None
    True
    """
    if stage == 3 and config.fisher.kind != "empirical":
        return (
            f"fisher {config.fisher.kind} has backward passes of its own, for which ZeRO 3 gathers no weights: take "
            "fisher empirical, stage 2, or FSDP2"
        )
    if stage == 0 and config.needs_objective:
        return f"settings that evaluate the loss again can't run inside {averager}'s step: take DDP, or other settings"
    return refusal_of_pieces(config, averager) if stage else None


def _refusals(config: Mapping[str, Any], *, of_job: bool) -> Iterator[str]:
    if of_job:
        for key, reason in OWNED.items():
            if key in config:
                yield f"{key} must be left out, got {config[key]!r}: {reason}"
        for key, reason in OWNED_IF_ENABLED.items():
            if "enabled" in _mapping(config.get(key)):
                yield f"{key}.enabled must be left out, got {config[key]['enabled']!r}: {reason}"
    elif config.get("gradient_clipping", 1.0) != 0.0:
        given = repr(config["gradient_clipping"]) if "gradient_clipping" in config else "nothing, which means 1.0"
        yield (
            f"gradient_clipping must be 0.0, got {given}: DeepSpeed would clip the gradient before it is made natural; "
            "write 0.0, and set clip of NGDConfig"
        )
    for key, reason in UNSUPPORTED.items():
        if _is_on(config.get(key)):
            yield f"{key} must be left out, got {config[key]!r}: {reason}"
    if config.get("managed_gradient_accumulation") is False:
        yield "managed_gradient_accumulation must be left out, got False: a step must know the divisor of its losses"
    if not isinstance(config.get("zero_optimization", {}), Mapping):
        yield f"zero_optimization must be an object of settings, got {config['zero_optimization']!r}"
    zero = _mapping(config.get("zero_optimization"))
    for key, reason in UNSUPPORTED_OF_ZERO.items():
        value = zero.get(key)
        is_large = key == "sub_group_size" and isinstance(value, int | float) and value >= MIN_SUB_GROUP_SIZE
        if _is_on(value) and not is_large:
            yield f"zero_optimization.{key} must be left out, got {value!r}: {reason}"
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_on(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(value.get("enabled", value and value.get("device") != "none"))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value > 1  # of a size: 1 is one rank
    return value not in OFF

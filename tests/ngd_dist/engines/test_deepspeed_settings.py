"""Keys of a DeepSpeed configuration that are refused, with the reason, without torch."""

import subprocess
import sys
from typing import Any

import pytest

from ngd_dist.config.deepspeed import OWNED, check_deepspeed

STAGE_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("config", [{}, STAGE_2, {"zero_optimization": {"stage": 3, "overlap_comm": True}}])
def test_other_keys_are_deepspeeds_own(config: dict[str, Any]) -> None:
    assert check_deepspeed(config | {"steps_per_print": 10, "wall_clock_breakdown": False}) == []


@pytest.mark.parametrize("key", OWNED)
def test_a_job_owns_its_keys(key: str) -> None:
    (refusal,) = check_deepspeed(STAGE_2 | {key: 4})

    assert refusal.startswith(f"{key} must be left out, got 4: ")
    assert check_deepspeed(STAGE_2 | {"gradient_clipping": 0.0, key: 0.0}, of_job=False) == []


@pytest.mark.parametrize("key", ["fp16", "bf16", "torch_autocast"])
def test_precision_is_the_jobs_and_its_details_are_deepspeeds(key: str) -> None:
    assert check_deepspeed({key: {"enabled": True}}) == [
        f"{key}.enabled must be left out, got True: precision of the job decides it"
    ]
    assert check_deepspeed({key: {"loss_scale_window": 100}}) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "got nothing, which means 1.0"),
        ({"gradient_clipping": 1.0}, "got 1.0"),
        ({"gradient_clipping": "auto"}, "got 'auto'"),
    ],
)
def test_an_engine_that_clips_is_refused(config: dict[str, Any], words: str) -> None:
    (refusal,) = check_deepspeed(STAGE_2 | config, of_job=False)

    assert refusal.startswith("gradient_clipping must be 0.0")
    assert words in refusal


@pytest.mark.parametrize(
    ("zero", "is_refused"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, True),
        ({"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}, True),
        ({"offload_optimizer": {"device": "none"}}, False),
        ({"zero_quantized_weights": True}, True),
        ({"zero_quantized_weights": False}, False),
        ({"zero_hpz_partition_size": 8}, True),
        ({"zero_hpz_partition_size": 1}, False),
        ({"round_robin_gradients": True}, True),
        ({"sub_group_size": 1000}, True),
        ({"sub_group_size": 1e12}, False),
        ({"zenflow": {"topk_ratio": 0.1}}, True),
        ({"stage": 4}, True),
    ],
)
def test_parts_of_zero(zero: dict[str, Any], is_refused: bool) -> None:
    refusals = check_deepspeed({"zero_optimization": {"stage": 3} | zero})

    assert len(refusals) == is_refused
    assert all(f"zero_optimization.{next(iter(zero))}" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("key", "value", "is_refused"),
    [
        ("tensor_parallel", {"autotp_size": 2}, True),
        ("pipeline", {"stages": 2}, True),
        ("amp", {"enabled": True}, True),
        ("amp", {"enabled": False}, False),
        ("sparse_gradients", True, True),
        ("sparse_gradients", False, False),
        ("autotuning", {"enabled": True}, True),
        ("compile", {"deepcompile": True}, True),
        ("managed_gradient_accumulation", False, True),
        ("managed_gradient_accumulation", True, False),
    ],
)
def test_other_kinds_of_parallelism(key: str, value: object, is_refused: bool) -> None:
    assert len(check_deepspeed({key: value})) == is_refused


def test_no_torch_is_loaded() -> None:
    code = "import sys, ngd_dist.config.deepspeed; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True)

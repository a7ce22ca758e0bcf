"""What `NGD.state_dict` keeps beside torch's own state: keyed by layer name, so that it fits any world size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ngd_dist.comm import Communicator
from ngd_dist.curvature import Curvature
from ngd_dist.errors import CheckpointError
from ngd_dist.staleness import Schedule, Track
from ngd_dist.statistics import Key, StatisticSpec
from ngd_dist.telemetry import StepStats

__all__ = ["check", "gather", "restore"]

FORMAT = 2  # 1 had no damping beside the caches
LayerState = dict[str, Any]


def gather(
    comm: Communicator, curvature: Curvature, mine: Sequence[str], schedule: Schedule, stats: StepStats
) -> dict[str, Any]:
    """Collective. Returns the whole state on every rank. `mine`: the layers that this rank reports on."""
    own: dict[str, LayerState] = {name: _layer_state(curvature, name) for name in mine}
    layers = {name: state for part in comm.all_gather_object("state_dict", own) for name, state in part.items()}
    tracks = {str(key): track for key, track in zip(schedule.tracks, schedule.state(), strict=True)}
    return {
        "format": FORMAT,
        "step": stats.step,
        "failed_inversions": stats.failed_inversions,
        "skipped_steps": stats.skipped_steps,
        "layers": layers,
        "tracks": tracks,
    }


def check(saved: Mapping[str, Any], specs: Mapping[Key, StatisticSpec]) -> None:
    """Returns if a gathered state fits these statistics.

    Raises: CheckpointError if it was saved by another format, or for other layers or shapes.
    """
    if saved.get("format") != FORMAT:
        raise CheckpointError(f"the state's format must be {FORMAT}, got {saved.get('format')}; save it again")
    expected, found = {str(key) for key in specs}, set(saved["tracks"])
    if expected != found:
        raise CheckpointError(
            f"the state is of another model: missing {sorted(expected - found)}, unknown {sorted(found - expected)}"
        )
    for key, spec in specs.items():
        value = saved["layers"][key.layer]["statistics"][key.statistic]["value"]
        if value is not None and value.numel() != spec.numbers:
            raise CheckpointError(
                f"the state is of another model: {key} must have {spec.numbers} numbers, got {value.numel()}"
            )


def restore(
    saved: Mapping[str, Any],
    curvature: Curvature,
    schedule: Schedule,
    holds: Callable[[str], bool],
    device: torch.device,
) -> None:
    """Takes over a gathered state that was checked: the whole schedule, and of the layers what this rank needs."""
    for key in schedule.tracks:
        schedule.tracks[key] = Track(**saved["tracks"][str(key)])
    for key, statistic in curvature.statistics.items():
        if holds(key.layer):
            statistic.load(saved["layers"][key.layer]["statistics"][key.statistic], device)
    for layer in curvature.caches:
        state = saved["layers"][layer]
        cache = None if state["cache"] is None else {name: value.to(device) for name, value in state["cache"].items()}
        curvature.damped_with[layer] = state["damping"]
        if holds(layer):
            curvature.caches[layer] = cache
        else:
            curvature.take_shared({layer: cache})


def _layer_state(curvature: Curvature, name: str) -> LayerState:
    cache = curvature.caches[name]
    return {
        "statistics": {key.statistic: s.state() for key, s in curvature.statistics.items() if key.layer == name},
        "cache": None if cache is None else dict(cache),
        "damping": curvature.damped_with.get(name, 0.0),
    }

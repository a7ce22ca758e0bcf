"""What `NGD.state_dict` keeps beside torch's own state: keyed by layer name, so that it fits any world size."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ngd_dist.comm import Communicator
from ngd_dist.errors import CheckpointError
from ngd_dist.preconditioners import Cache
from ngd_dist.staleness import Schedule, Track
from ngd_dist.statistics import Key, Statistic, StatisticSpec

__all__ = ["check", "gather", "restore"]

FORMAT = 1
LayerState = dict[str, Any]


def gather(
    comm: Communicator,
    statistics: Mapping[Key, Statistic],
    caches: Mapping[str, Cache | None],
    schedule: Schedule,
    step: int,
    failed_inversions: int,
) -> dict[str, Any]:
    """Collective. Returns the whole state on every rank. `statistics` and `caches` are those this rank reports on."""
    own: dict[str, LayerState] = {
        layer: {
            "statistics": {key.statistic: s.state() for key, s in statistics.items() if key.layer == layer},
            "cache": None if cache is None else dict(cache),
        }
        for layer, cache in caches.items()
    }
    layers = {name: state for part in comm.all_gather_object("state_dict", own) for name, state in part.items()}
    tracks = {str(key): track for key, track in zip(schedule.tracks, schedule.state(), strict=True)}
    return {
        "format": FORMAT,
        "step": step,
        "failed_inversions": failed_inversions,
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
    statistics: Mapping[Key, Statistic],
    caches: dict[str, Cache | None],
    schedule: Schedule,
    holds: Callable[[str], bool],
    device: torch.device,
) -> None:
    """Takes over a gathered state that was checked: the whole schedule, and of the layers those that this rank holds."""
    for key in schedule.tracks:
        schedule.tracks[key] = Track(**saved["tracks"][str(key)])
    for key, statistic in statistics.items():
        if holds(key.layer):
            statistic.load(saved["layers"][key.layer]["statistics"][key.statistic], device)
    for layer in filter(holds, caches):
        cache = saved["layers"][layer]["cache"]
        caches[layer] = None if cache is None else {name: value.to(device) for name, value in cache.items()}

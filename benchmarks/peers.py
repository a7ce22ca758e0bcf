"""Every optimizer under test, ours and rivals', behind one small protocol: `build(name, model, refresh)`.

A rival whose package is missing is skipped by name with the reason (`why_not`). Names of refreshes are
"statistics every / inverses every"; an optimizer with one interval offers only those that it can do (`refreshes`).
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.rivals import RIVALS
from benchmarks.trainer import DAMPING, STEP_LENGTH, Peer, Refresh, Setting, Trainer, Training
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, KFAC, AdaptiveInterval, FixedInterval

__all__ = ["PEERS", "Peer", "Refresh", "Setting", "Trainer", "Training", "build", "refreshes", "why_not"]

ROWS: dict[str, Any] = {"rows": 128}
SAMPLING: dict[str, Any] = {"rows_per_dimension": 2.0}

NGD_KINDS = {
    "momentum_buffer": "momentum",
    ".caches": "inverses",
    "_caches": "inverses",
    "statistics": "statistics",
    "._values": "statistics",  # of this step's passes
    "._micros": "kept rows",
    "._rows": "kept rows",
    "_strategy": "buffers",
    "_comm": "buffers",
}


def _ngd(**choices: Any) -> Callable[[nn.Module, Setting], Training]:
    def build(model: nn.Module, setting: Setting) -> Training:
        adaptive = setting.refresh == "adaptive"
        staleness = AdaptiveInterval() if adaptive else FixedInterval(steps=setting.inverses_every)
        settings: dict[str, Any] = {"lr": setting.lr, "damping": DAMPING, "staleness": staleness} | choices
        if setting.sampled:
            settings["preconditioner"] = KFAC(**ROWS)
        optimizer = NGD(model, NGDConfig(**settings))
        return Training("", model, lambda x, y: optimizer.step(), optimizer, NGD_KINDS)

    return build


NGD_REFRESHES: tuple[Refresh, ...] = ("1/1", "10/10", "adaptive")


def _kfac_lacks(*fields: str) -> Callable[[], str | None]:
    missing = [name for name in fields if name not in KFAC.model_fields]
    return lambda: f"this ngd_dist has no KFAC.{missing[0]}" if missing else None


def _ngd_kfac(**fields: Any) -> Peer:
    def build(model: nn.Module, setting: Setting) -> Training:
        return _ngd(preconditioner=KFAC(**fields))(model, setting)

    return Peer(build, "ngd_dist", NGD_REFRESHES, _kfac_lacks(*fields))


PEERS: dict[str, Peer] = {
    "sgd": RIVALS["sgd"],
    "ngd": Peer(_ngd(), "ngd_dist", NGD_REFRESHES),
    "ngd rows": _ngd_kfac(**ROWS),
    "ngd sampled": _ngd_kfac(**SAMPLING),
    "ngd ekfac": Peer(_ngd(preconditioner=EKFAC()), "ngd_dist", NGD_REFRESHES),
} | RIVALS


def build(
    name: str, model: nn.Module, refresh: Refresh = "1/1", *, sampled: bool = False, lr: float = STEP_LENGTH
) -> Trainer:
    """Returns the optimizer of that name over this model. Raises: ValueError if it can't be built; see `why_not`."""
    if reason := why_not(name):
        raise ValueError(f"{name}: {reason}")
    peer = PEERS[name]
    if refresh not in peer.refreshes:
        raise ValueError(f"{name} has no refresh {refresh}; it offers {', '.join(peer.refreshes)}")
    trainer: Trainer = peer.build(model, Setting(refresh, sampled, lr))
    trainer.name = name
    return trainer


def refreshes(name: str) -> tuple[Refresh, ...]:
    """Returns the refreshes that the optimizer of that name offers."""
    return PEERS[name].refreshes


def why_not(name: str) -> str | None:
    """Returns why the optimizer of that name can't run here, or None if it can."""
    peer = PEERS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(peer.needs)
    except ImportError as error:
        return f"{peer.needs} is not importable ({error})"
    return peer.lacks()

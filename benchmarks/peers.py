"""All optimizers under test, ours and rivals, behind one small protocol: `build(name, model, refresh)`.

If a rival's package is missing, the rival is skipped, with the reason (`why_not`). Names of refreshes are
"statistics every / inverses every"; an optimizer with one interval offers only those that fit it (`refreshes`).
"""

import importlib
import warnings
from typing import Any

from torch import nn

from benchmarks.rivals import RIVALS
from benchmarks.trainer import DAMPING, STEP_LENGTH, Peer, Refresh, Setting, Trainer, Training
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, KFAC, AdaptiveInterval, FixedInterval

__all__ = ["PEERS", "Peer", "Refresh", "Setting", "Trainer", "Training", "build", "ngd", "refreshes", "why_not"]

NGD_KINDS = {
    "momentum_buffer": "momentum",
    ".caches": "inverses",
    "_caches": "inverses",
    "statistics": "statistics",
    "._means": "statistics",  # of this step's passes
    ".layer_batches": "kept rows",
    "gradient_rows": "kept rows",
    "._waiting": "kept rows",
    "_sync": "buffers",
    "_comm": "buffers",
}


NGD_REFRESHES: tuple[Refresh, ...] = ("1/1", "10/10", "adaptive")
EMA_DECAY = 0.95  # of statistics that are estimated more often than they are inverted, as in the rivals


def ngd(refreshes: tuple[Refresh, ...] = ("1/10", *NGD_REFRESHES), **choices: Any) -> Peer:
    def build(model: nn.Module, setting: Setting) -> Training:
        settings: dict[str, Any] = {"lr": setting.lr, "damping": DAMPING} | choices
        if setting.refresh == "adaptive":
            settings["staleness"] = AdaptiveInterval()
        elif setting.statistics_every < setting.inverses_every:
            every, settings["ema_decay"] = setting.statistics_every, EMA_DECAY
            settings["staleness"] = FixedInterval(steps=setting.inverses_every, statistics_steps=every)
        else:
            settings["staleness"] = FixedInterval(steps=setting.inverses_every)
        optimizer = NGD(model, NGDConfig(**settings))
        return Training("", model, lambda x, y: optimizer.step(), optimizer, NGD_KINDS)

    return Peer(build, "ngd_dist", refreshes)


# Factors at least twice as wide as the rows are kept as rows, without an average: 256 are all of a batch of 256.
PEERS: dict[str, Peer] = {
    "sgd": RIVALS["sgd"],
    "ngd": ngd(),
    "ngd rows 256": ngd(NGD_REFRESHES, preconditioner=KFAC(rows=256)),
    "ngd rows 128": ngd(NGD_REFRESHES, preconditioner=KFAC(rows=128)),
    "ngd rows 64": ngd(NGD_REFRESHES, preconditioner=KFAC(rows=64)),
    "ngd ekfac": ngd(preconditioner=EKFAC()),
} | RIVALS


def build(name: str, model: nn.Module, refresh: Refresh = "1/1", *, lr: float = STEP_LENGTH) -> Trainer:
    """Returns the optimizer of that name over this model. Raises: ValueError if it can't be built; see `why_not`."""
    if reason := why_not(name):
        raise ValueError(f"{name}: {reason}")
    peer = PEERS[name]
    if refresh not in peer.refreshes:
        raise ValueError(f"{name} has no refresh {refresh}; it offers {', '.join(peer.refreshes)}")
    trainer: Trainer = peer.build(model, Setting(refresh, lr))
    trainer.name = name
    return trainer


def refreshes(name: str) -> tuple[Refresh, ...]:
    """Returns the refreshes that the optimizer of that name offers."""
    return PEERS[name].refreshes


def why_not(name: str) -> str | None:
    """Returns the reason why the optimizer of that name can't run here; None if it can."""
    peer = PEERS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(peer.needs)
    except ImportError as error:
        return f"{peer.needs} is not importable ({error})"
    return peer.lacks()

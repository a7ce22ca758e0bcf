"""The settings of each method in `steps_to_target`, by batch size: at most six, and others that ours tried."""

from itertools import product
from typing import Any

from benchmarks.target_methods import Setting

__all__ = ["EXPLORED", "SETTINGS"]


def grid(lengths: dict[int, int], *options: dict[str, Any]) -> list[Setting]:
    """Returns each of the options at each length; `lengths` maps steps to the warm-up within them."""
    return [Setting(steps, warmup, each) for each, (steps, warmup) in product(options, lengths.items())]


def rates(*lrs: float) -> list[dict[str, Any]]:
    return [{"lr": lr} for lr in lrs]


SINGD = {"T": 1, "lr_cov": 0.05, "normalize_lr_cov": True}  # T = 10 and lr_cov = 0.01, its defaults, were far slower
KL = {"kind": "kl", "max_kl": 0.01}
MONTE_CARLO = {"kind": "monte_carlo"}


def adaptive(damping: float, ema_decay: float, **others: Any) -> dict[str, Any]:
    """Returns NGD that chooses lr, momentum and damping itself; None stands for NGDConfig's default."""
    chosen = {
        "step_length": {"kind": "quadratic_model"},
        "damping_rule": {"kind": "levenberg_marquardt"},
        "fisher": MONTE_CARLO,
        "staleness": every(1),
        "damping": damping,
        "ema_decay": ema_decay,
    }
    return {name: value for name, value in (chosen | others).items() if value is not None}


def every(steps: int) -> dict[str, Any]:
    return {"kind": "fixed", "steps": steps}


SETTINGS: dict[int, dict[str, list[Setting]]] = {
    4096: {
        "ngd": grid(
            {60: 0},
            adaptive(0.1, 0.9),
            adaptive(0.03, 0.9, staleness=None),
            adaptive(0.01, 0.9),
            adaptive(0.01, 0.9, staleness=every(3)),
            {"lr": 0.3, "damping": 0.01, "ema_decay": 0.9, "clip": KL, "fisher": MONTE_CARLO},
        )
        + grid({120: 0}, {"lr": 0.1, "damping": 0.1}),
        "sgd": grid({160: 20, 240: 20}, *rates(0.1, 0.2, 0.3)),
        "adamw": grid({100: 10, 160: 10}, *rates(0.005, 0.01, 0.02)),
        "lamb": grid({80: 10, 140: 10}, *rates(0.02, 0.04, 0.08)),
        "muon": grid(
            {60: 5, 100: 5},
            {"lr": 0.02, "adamw_lr": 0.01},
            {"lr": 0.05, "adamw_lr": 0.01},
            {"lr": 0.05, "adamw_lr": 0.02},
        ),
        "soap": grid({50: 5, 90: 5}, *rates(0.005, 0.01, 0.02)),
        "singd": grid(
            {100: 5},
            {"lr": 0.03, "damping": 0.01} | SINGD,
            {"lr": 0.1, "damping": 0.01} | SINGD,
            {"lr": 0.1, "damping": 0.1} | SINGD,
            {"lr": 0.3, "damping": 0.1} | SINGD,
            {"lr": 0.03, "damping": 0.001} | SINGD,
            {"lr": 0.1, "damping": 0.1, "T": 1},
        ),
    },
    512: {
        "ngd": grid(
            {80: 0},
            {"lr": 0.1, "damping": 0.03, "ema_decay": 0.95, "clip": KL, "fisher": MONTE_CARLO},
            {"lr": 0.1, "damping": 0.1, "ema_decay": 0.95, "clip": KL, "fisher": MONTE_CARLO},
            {"lr": 0.1, "damping": 0.03, "ema_decay": 0.9, "clip": KL, "fisher": MONTE_CARLO},
        )
        + grid({120: 0}, adaptive(0.1, 0.95), adaptive(0.3, 0.95))
        + grid({300: 0}, {"lr": 0.05, "damping": 0.1}),
        # The second length is tried with the settings that did best at the first.
        "sgd": grid({300: 20}, *rates(0.03, 0.1, 0.2)),
        "adamw": grid({300: 10}, *rates(0.003, 0.005, 0.01)) + grid({160: 10}, *rates(0.01)),
        "lamb": grid({160: 10}, *rates(0.01, 0.02, 0.04, 0.08)) + grid({300: 10}, *rates(0.02, 0.04)),
        "muon": grid(
            {240: 10},
            {"lr": 0.02, "adamw_lr": 0.01},
            {"lr": 0.05, "adamw_lr": 0.01},
            {"lr": 0.05, "adamw_lr": 0.02},
        )
        + grid({120: 10}, {"lr": 0.05, "adamw_lr": 0.01}),
        "soap": grid({200: 10}, *rates(0.005, 0.01, 0.02)) + grid({100: 10}, *rates(0.02)),
        "singd": grid(
            {200: 10},
            {"lr": 0.01, "damping": 0.001} | SINGD,
            {"lr": 0.03, "damping": 0.001} | SINGD,
        )
        + grid({100: 10}, {"lr": 0.01, "damping": 0.001} | SINGD),
    },
}

EXPLORED: dict[int, dict[str, list[Setting]]] = {
    4096: {
        "ngd": grid(
            {60: 0},
            adaptive(0.1, 0.9, staleness=None, burn_in=2),
            adaptive(0.1, 0.9, burn_in=2),
            adaptive(0.1, 0.9, burn_in=2, damping_rule=None),
            adaptive(0.1, 0.9, burn_in=2, fisher=None),
            adaptive(0.1, 0.95, burn_in=2, preconditioner={"kind": "kfac", "damping_form": "exact"}),
            adaptive(0.3, 0.9, burn_in=2, fisher={"kind": "exact"}),
            adaptive(0.03, 0.9, burn_in=2),
            adaptive(0.03, 0.9, staleness=every(3), fisher=None),
            adaptive(0.03, 0.95),
            {"lr": 0.3, "damping": 0.03, "ema_decay": 0.9, "clip": KL, "fisher": MONTE_CARLO},
            {"lr": 0.3, "damping": 0.1, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.3, "damping": 0.1, "ema_decay": 0.9, "clip": {"kind": "kl", "max_kl": 0.03}},
            {"lr": 0.3, "damping": 0.1, "ema_decay": 0.9, "clip": KL}
            | {"preconditioner": {"kind": "kfac", "damping_form": "exact"}},
            {"lr": 0.3, "damping": 0.01, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.1, "damping": 0.03},
            {"lr": 0.1, "damping": 0.03, "ema_decay": 0.9},
            {"lr": 0.1, "damping": 0.03, "ema_decay": 0.9, "staleness": every(1)},
            {"lr": 0.1, "damping": 0.01, "ema_decay": 0.9, "fisher": MONTE_CARLO},
            {"lr": 0.3, "damping": 0.03, "ema_decay": 0.9, "fisher": MONTE_CARLO},
            {"lr": 0.3, "damping": 0.1, "ema_decay": 0.9, "fisher": MONTE_CARLO},
            {"lr": 0.1, "damping": 0.01, "ema_decay": 0.9, "preconditioner": {"kind": "ekfac"}},
            {"lr": 0.1, "damping": 0.001, "ema_decay": 0.9, "preconditioner": {"kind": "ekfac"}, "clip": KL},
            {"lr": 0.1, "damping": 0.01, "ema_decay": 0.9, "preconditioner": {"kind": "kfac", "sharing": "reduce"}},
        )
        + grid({120: 0}, {"lr": 0.05, "damping": 0.01})
        + grid({80: 0}, adaptive(1.0, 0.9, burn_in=2)),
        "lamb": grid({160: 10}, *rates(0.03)),
        "muon": grid({120: 10}, {"lr": 0.02, "adamw_lr": 0.01}),
        "soap": grid({120: 10}, *rates(0.01)),
        "singd": grid({120: 10}, {"lr": 0.01, "damping": 0.01}),
    },
    512: {
        "ngd": grid(
            {120: 0},
            {"lr": 0.1, "damping": 0.03, "ema_decay": 0.95, "clip": KL, "fisher": MONTE_CARLO},
            {"lr": 0.1, "damping": 0.03, "ema_decay": 0.95, "clip": {"kind": "kl", "max_kl": 0.003}}
            | {"fisher": MONTE_CARLO},
            {"lr": 0.05, "damping": 0.03, "ema_decay": 0.95, "fisher": MONTE_CARLO},
            adaptive(0.3, 0.95, staleness=every(3), damping_rule=None),
        )
        + grid({60: 0}, {"lr": 0.15, "damping": 0.03, "ema_decay": 0.95, "clip": KL, "fisher": MONTE_CARLO})
        + grid({200: 0}, adaptive(0.1, 0.95), adaptive(0.3, 0.95)),
        "lamb": grid({300: 10}, *rates(0.01)),
    },
}

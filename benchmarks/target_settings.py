"""The settings of each method in `steps_to_target`, by batch size: at most six, and what else was tried of ours."""

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
QUADRATIC = {
    "step_length": {"kind": "quadratic_model"},
    "fisher": {"kind": "monte_carlo"},
    "damping": 1.0,
    "damping_rule": {"kind": "levenberg_marquardt"},
    "ema_decay": 0.9,
    "burn_in": 2,
    "staleness": {"kind": "fixed", "steps": 1},
}

SETTINGS: dict[int, dict[str, list[Setting]]] = {
    4096: {
        "ngd": grid(
            {60: 0},
            {"lr": 0.3, "damping": 0.1, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.3, "damping": 0.01, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.2, "damping": 0.05, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.3, "damping": 0.01, "ema_decay": 0.9, "clip": KL, "fisher": {"kind": "monte_carlo"}},
        )
        + grid({120: 0}, {"lr": 0.1, "damping": 0.1})
        + grid({80: 0}, QUADRATIC),
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
            {200: 0},
            {"lr": 0.1, "damping": 0.1, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.1, "damping": 0.01, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.05, "damping": 0.05, "ema_decay": 0.9, "clip": KL},
            {"lr": 0.1, "damping": 0.01, "ema_decay": 0.9, "clip": KL, "fisher": {"kind": "monte_carlo"}},
        )
        + grid({400: 0}, {"lr": 0.05, "damping": 0.1})
        + grid({200: 0}, QUADRATIC),
        "sgd": grid({300: 20, 500: 20}, *rates(0.03, 0.1, 0.2)),
        "adamw": grid({160: 10, 300: 10}, *rates(0.003, 0.005, 0.01)),
        "lamb": grid({160: 10, 300: 10}, *rates(0.01, 0.02, 0.04)),
        "muon": grid(
            {120: 10, 240: 10},
            {"lr": 0.01, "adamw_lr": 0.005},
            {"lr": 0.02, "adamw_lr": 0.005},
            {"lr": 0.02, "adamw_lr": 0.01},
        ),
        "soap": grid({100: 10, 200: 10}, *rates(0.003, 0.005, 0.01)),
        "singd": grid(
            {200: 10},
            {"lr": 0.01, "damping": 0.01} | SINGD,
            {"lr": 0.03, "damping": 0.01} | SINGD,
            {"lr": 0.03, "damping": 0.1} | SINGD,
            {"lr": 0.1, "damping": 0.1} | SINGD,
            {"lr": 0.01, "damping": 0.001} | SINGD,
            {"lr": 0.03, "damping": 0.1, "T": 1},
        ),
    },
}


def explored(steps: int, *options: dict[str, Any]) -> list[Setting]:
    return grid({steps: 0}, *({"lr": 0.1} | each for each in options))


EXPLORED: dict[int, dict[str, list[Setting]]] = {
    4096: {
        "ngd": [
            Setting(120, 0, {"lr": 0.05, "damping": 0.01}),
            *explored(
                60,
                {"damping": 0.03},
                {"damping": 0.03, "ema_decay": 0.9},
                {"damping": 0.03, "ema_decay": 0.9, "staleness": {"kind": "fixed", "steps": 1}},
                {"damping": 0.01, "ema_decay": 0.9, "fisher": {"kind": "monte_carlo"}},
                {"lr": 0.3, "damping": 0.03, "ema_decay": 0.9, "fisher": {"kind": "monte_carlo"}},
                {"lr": 0.3, "damping": 0.1, "ema_decay": 0.9, "fisher": {"kind": "monte_carlo"}},
                {"damping": 0.01, "ema_decay": 0.9, "preconditioner": {"kind": "ekfac"}},
                {"damping": 0.001, "ema_decay": 0.9, "preconditioner": {"kind": "ekfac"}, "clip": KL},
                {"damping": 0.01, "ema_decay": 0.9, "preconditioner": {"kind": "kfac", "sharing": "reduce"}},
            ),
        ]
    }
}

"""Is it the method or this package that keeps LNGD from the digits' target? Its parts, one by one, and beside K-FAC.

python bench.py DATA_DIR WORK_DIR
"""

import sys
from pathlib import Path

import torch

from benchmarks.methods.catalogue import METHODS, Method
from benchmarks.methods.run import Run, outcome_of
from benchmarks.methods.tasks import TASKS
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC, LNGD, AdamWFallback, FixedInterval, GivenLength, KLClip, LayerWise

TASK, STEPS, SEED = "digits-mlp", 100, 1
FRAME = {"staleness": FixedInterval(steps=3), "ema_decay": 0.9, "fallback": AdamWFallback(lr=0.02)}


def attempt(label: str, lr: float, **choices: object) -> None:
    config = NGDConfig(lr=lr, **FRAME | choices)
    name = f"{label}, lr {lr}"
    METHODS[name] = Method(lambda model, options: NGD(model, config), {"lr": None}, is_ours=True)
    row = outcome_of(Run(TASK, name, {"steps": STEPS}, SEED), TASKS[TASK], data, work)
    losses = ", ".join(f"{point['loss']:.3g}" for point in row["curve"][:8])
    print(f"| {label} | {lr} | {row['ending']} | {row['target_step'] or '-'} | {losses} |", flush=True)


torch.set_num_threads(1)
data, work = TASKS[TASK].load(Path(sys.argv[1])), Path(sys.argv[2])
for mu in (1e-8, 1e-4, 1e-2, 1.0):
    for lr in (0.01, 0.1):
        attempt(f"LNGD, rate per layer, mu {mu:g}", lr, preconditioner=LNGD(), step_length=LayerWise(mu=mu))
for lr in (0.001, 0.01, 0.1):
    attempt("LNGD, given rate", lr, preconditioner=LNGD(), step_length=GivenLength())
    attempt(
        "LNGD, given rate, KL clip 0.01", lr, preconditioner=LNGD(), step_length=GivenLength(), clip=KLClip(max_kl=0.01)
    )
for lr in (0.03, 0.1):
    attempt("K-FAC, rate per layer", lr, preconditioner=KFAC(), damping=0.03, step_length=LayerWise())
    attempt("K-FAC, given rate", lr, preconditioner=KFAC(), damping=0.03)

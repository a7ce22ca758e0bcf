"""A choice of each of a job's optimizers, by kind, whose lr suits small models on the digits."""

from typing import Any

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ngd": {"kind": "ngd", "lr": 0.01, "damping": 0.01},
    "sgd": {"kind": "sgd", "lr": 0.1},
    "adamw": {"kind": "adamw", "lr": 0.003},
    "lars": {"kind": "lars", "lr": 0.1, "trust_coefficient": 0.05},
    "lamb": {"kind": "lamb", "lr": 0.01},
    "muon": {"kind": "muon", "lr": 0.02, "adamw_lr": 0.003},
    "soap": {"kind": "soap", "lr": 0.003, "precondition_frequency": 3},
    "shampoo": {"kind": "shampoo", "lr": 0.1, "start_preconditioning_step": 2, "preconditioning_compute_steps": 2},
}
# Two matrices are the first and the last: Muon has something to do from three on.
DEEP = {"kind": "mlp", "hidden": [16, 16]}

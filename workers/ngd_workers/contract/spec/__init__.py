"""The contents of a job: the JobSpec and every choice under it. Imports without torch.

Start at `job`. Each other module holds the choices of one part: models, sources of data, tasks, optimizers, and `run`,
the course of the job.
"""

from ngd_workers.contract.spec.job import AnySpec, Job, JobSpec, LoopSpec, OwnLoop, spec_class, spec_of_json
from ngd_workers.contract.spec.models import MLP, ModelChoice, SmallCNN, UserModel
from ngd_workers.contract.spec.optimizers import SGD, AdamW, NGDOptimizer, OptimizerChoice
from ngd_workers.contract.spec.run import (
    Batch,
    Checkpoint,
    ConstantLR,
    Failure,
    Loading,
    PolynomialLR,
    Resources,
    Schedule,
    Target,
)
from ngd_workers.contract.spec.sources import IDX, DataChoice, Digits, UserData
from ngd_workers.contract.spec.tasks import ImageClassification, TaskChoice

__all__ = [
    "IDX",
    "MLP",
    "SGD",
    "AdamW",
    "AnySpec",
    "Batch",
    "Checkpoint",
    "ConstantLR",
    "DataChoice",
    "Digits",
    "Failure",
    "ImageClassification",
    "Job",
    "JobSpec",
    "Loading",
    "LoopSpec",
    "ModelChoice",
    "NGDOptimizer",
    "OptimizerChoice",
    "OwnLoop",
    "PolynomialLR",
    "Resources",
    "Schedule",
    "SmallCNN",
    "Target",
    "TaskChoice",
    "UserData",
    "UserModel",
    "spec_class",
    "spec_of_json",
]

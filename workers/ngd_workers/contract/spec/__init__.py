"""The contents of a job: the JobSpec and every choice under it. Imports without torch.

Start at `job`. Each other module holds the choices of one part: models, sources of data, tasks, optimizers, and `run`,
the course of the job.
"""

from ngd_workers.contract.spec.images import ImageSettings, NoAugment, PadCrop, RandomResizedCrop
from ngd_workers.contract.spec.job import Job, JobSpec
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
from ngd_workers.contract.spec.sources import (
    IDX,
    DataChoice,
    Digits,
    ImageFolder,
    ShardCache,
    UserData,
    WebDataset,
)
from ngd_workers.contract.spec.tasks import ImageClassification, TaskChoice

__all__ = [
    "IDX",
    "MLP",
    "SGD",
    "AdamW",
    "Batch",
    "Checkpoint",
    "ConstantLR",
    "DataChoice",
    "Digits",
    "Failure",
    "ImageClassification",
    "ImageFolder",
    "ImageSettings",
    "Job",
    "JobSpec",
    "Loading",
    "ModelChoice",
    "NGDOptimizer",
    "NoAugment",
    "OptimizerChoice",
    "PadCrop",
    "PolynomialLR",
    "RandomResizedCrop",
    "Resources",
    "Schedule",
    "ShardCache",
    "SmallCNN",
    "Target",
    "TaskChoice",
    "UserData",
    "UserModel",
    "WebDataset",
]

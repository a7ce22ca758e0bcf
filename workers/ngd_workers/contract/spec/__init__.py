"""The contents of a job: the JobSpec and every choice under it. Imports without torch.

Start at `job`. Each other module holds the choices of one part: models, sources of data, tasks, optimizers, and `run`,
the course of the job.
"""

from ngd_workers.contract.spec.job import AnySpec, Job, JobSpec, LoopSpec, spec_class, spec_of_json
from ngd_workers.contract.spec.models import (
    MLP,
    InitChoice,
    InitFromCheckpoint,
    InitFromFile,
    ModelChoice,
    SmallCNN,
    Timm,
    Torchvision,
    Transformers,
    UserModel,
)
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
from ngd_workers.contract.spec.tasks import (
    Erasing,
    ImageClassification,
    Labelling,
    Mixup,
    Regression,
    TaskChoice,
    UserTask,
)

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
    "Erasing",
    "Failure",
    "ImageClassification",
    "InitChoice",
    "InitFromCheckpoint",
    "InitFromFile",
    "Job",
    "JobSpec",
    "Labelling",
    "Loading",
    "LoopSpec",
    "Mixup",
    "ModelChoice",
    "NGDOptimizer",
    "OptimizerChoice",
    "PolynomialLR",
    "Regression",
    "Resources",
    "Schedule",
    "SmallCNN",
    "Target",
    "TaskChoice",
    "Timm",
    "Torchvision",
    "Transformers",
    "UserData",
    "UserModel",
    "UserTask",
    "spec_class",
    "spec_of_json",
]

"""The contents of a job: the JobSpec and every choice under it. Imports without torch.

Start at `job`. Each other module holds the choices of one part: models, sources of data, tasks, optimizers, and `run`,
the course of the job.
"""

from ngd_workers.contract.spec.images import Augment, ImageSettings, NoAugment, OnBadSample, PadCrop, RandomResizedCrop
from ngd_workers.contract.spec.job import (
    AnySpec,
    Job,
    JobSpec,
    KeptCheckpoints,
    LoopSpec,
    OwnLoop,
    spec_class,
    spec_of_json,
)
from ngd_workers.contract.spec.models import (
    GPT,
    MLP,
    EncoderDecoder,
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
from ngd_workers.contract.spec.sources import (
    IDX,
    DataChoice,
    Digits,
<<<<<<< HEAD
    HuggingFace,
    ImageFolder,
    JpegNpz,
    Parquet,
    ShardCache,
    Table,
    UserData,
    WebDataset,
=======
    TextPairs,
    Tokens,
    UserData,
>>>>>>> t-lang
)
from ngd_workers.contract.spec.tasks import (
    Erasing,
    ImageClassification,
    Labelling,
    LanguageModelling,
    Mixup,
    Regression,
    TaskChoice,
    Translation,
    UserTask,
)
from ngd_workers.contract.spec.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    TokenizerChoice,
    TokenizerFile,
    WordTokenizer,
)

__all__ = [
    "GPT",
    "IDX",
    "MLP",
    "SGD",
    "AdamW",
    "AnySpec",
<<<<<<< HEAD
    "Augment",
=======
    "BPETokenizer",
>>>>>>> t-lang
    "Batch",
    "ByteTokenizer",
    "CharacterTokenizer",
    "Checkpoint",
    "ConstantLR",
    "DataChoice",
    "Digits",
    "EncoderDecoder",
    "Erasing",
    "Failure",
    "HuggingFace",
    "ImageClassification",
    "ImageFolder",
    "ImageSettings",
    "InitChoice",
    "InitFromCheckpoint",
    "InitFromFile",
    "Job",
    "JobSpec",
    "JpegNpz",
    "KeptCheckpoints",
    "Labelling",
    "LanguageModelling",
    "Loading",
    "LoopSpec",
    "Mixup",
    "ModelChoice",
    "NGDOptimizer",
    "NoAugment",
    "OnBadSample",
    "OptimizerChoice",
    "OwnLoop",
    "PadCrop",
    "Parquet",
    "PolynomialLR",
    "RandomResizedCrop",
    "Regression",
    "Resources",
    "Schedule",
    "ShardCache",
    "SmallCNN",
    "Table",
    "Target",
    "TaskChoice",
    "TextPairs",
    "Timm",
    "TokenizerChoice",
    "TokenizerFile",
    "Tokens",
    "Torchvision",
    "Transformers",
    "Translation",
    "UserData",
    "UserModel",
    "UserTask",
<<<<<<< HEAD
    "WebDataset",
=======
    "WordTokenizer",
>>>>>>> t-lang
    "spec_class",
    "spec_of_json",
]

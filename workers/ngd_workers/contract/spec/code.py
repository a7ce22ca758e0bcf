"""The user's own code: the folder that travels with a job, and the variables that its processes see."""

import re
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from ngd_workers.contract.spec.base import SpecModel

__all__ = ["MAX_ARCHIVE_BYTES", "MAX_UNPACKED_BYTES", "SHA256_PATTERN", "Code", "Environment", "Image", "Secrets"]

MAX_ARCHIVE_BYTES = 100 << 20  # code, not data: data lie below NGD_DATA_DIR, or in a bucket
MAX_UNPACKED_BYTES = 5 * MAX_ARCHIVE_BYTES
SHA256_PATTERN = r"^[0-9a-f]{64}$"
MAX_PATTERNS = 1000
MAX_VARIABLES = 200
MAX_VARIABLE_BYTES = 32 << 10  # the kernel takes 128 KiB, the name included
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
# registry:port/path:tag@digest, as Docker's reference grammar has it; the registry, tag and digest may be absent.
IMAGE_PATTERN = (
    r"^([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?"
    r"(@sha256:[0-9a-f]{64})?$"
)
SECRET = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}")  # a file's name, as the keys of a Kubernetes secret are
# Of the service, Ray, torch and Python: processes have read them before the job's are set.
TAKEN_PREFIXES = ("NGD_", "RAY_", "LD_", "PYTHON", "TORCHELASTIC_")
TAKEN_NAMES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
    }
)


def _usable(names: dict[str, str]) -> dict[str, str]:
    for name in names:
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"a variable has letters, digits and _, and no digit first, got {name[:80]!r}")
        if name in TAKEN_NAMES or name.startswith(TAKEN_PREFIXES):
            raise ValueError(f"{name} is set by the service, Ray, torch or Python themselves; leave it out")
    return names


def _carried(values: dict[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if "\0" in value or len(value.encode(errors="surrogateescape")) > MAX_VARIABLE_BYTES:
            raise ValueError(
                f"the value of {name} must be a text of at most {MAX_VARIABLE_BYTES:,} bytes, none of them zero; put "
                "longer ones into a file of your code"
            )
    return values


def _files(names: dict[str, str]) -> dict[str, str]:
    for variable, name in names.items():
        if not SECRET.fullmatch(name):
            raise ValueError(
                f"{variable} must name a secret, letters, digits, -, _ and . without / and not beginning with a dot, "
                f"got {name[:80]!r}"
            )
    return names


Environment = Annotated[
    dict[str, str],
    AfterValidator(_usable),
    AfterValidator(_carried),
    Field(
        max_length=MAX_VARIABLES,
        description="Environment variables of the workers, NCCL's and gloo's among them: NCCL_SOCKET_IFNAME, "
        "NCCL_IB_HCA, NCCL_DEBUG. Everybody who may see the job sees them: put passwords into secrets.",
    ),
]
Secrets = Annotated[
    dict[str, str],
    AfterValidator(_usable),
    AfterValidator(_files),
    Field(
        max_length=MAX_VARIABLES,
        description="Environment variables whose values are secrets: the name of each one's file in the operator's "
        "NGD_SECRETS_DIR, read where the workers run.",
    ),
]

Image = Annotated[
    str,
    Field(
        max_length=512,
        pattern=IMAGE_PATTERN,
        description="The image of the job's pods, made from the worker's image of the service's version. For the "
        "dispatcher kuberay; None: the worker's image.",
    ),
]


class Code(SpecModel):
    """A folder of the user's that `ngd submit` ships: it is the workers' present folder, and last on their path."""

    directory: str = Field(default=".", min_length=1, description="The folder, relative to the job's file.")
    include: list[str] = Field(
        default=[],
        max_length=MAX_PATTERNS,
        description="Patterns, as in .gitignore, of files that are shipped although a .gitignore names them.",
    )
    exclude: list[str] = Field(
        default=[], max_length=MAX_PATTERNS, description="Patterns, as in .gitignore, of files that stay."
    )
    requirements: str | None = Field(
        default=None,
        description="A file of requirements inside the folder; packages that the workers lack are installed there.",
    )
    sha256: str | None = Field(
        default=None, pattern=SHA256_PATTERN, description="Of the folder's archive; ngd submit fills it in."
    )

    @field_validator("requirements")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        if path is not None and (not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
            raise ValueError(f"must be the path of a file inside code.directory, got {path!r}; copy it there")
        return path

"""The files of a job's checkpoints, as the workers write them and the service reads them. Imports without torch.

RUN_DIR/checkpoints/step-<8 digits>/
    weights.safetensors      the model's state, for whoever wants no more
    state.pt                 the rest as rank 0 has it: optimizer, progress; all of an own loop
    state-rank<r>.pt         the part of the optimizer's state that rank r alone has
    manifest.json            the size and the sha256 of each of these files: the commit
    pinned                   an empty file: the checkpoint stays, however many come after it
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ngd_workers.contract.rundir import read_json

__all__ = [
    "MANIFEST",
    "PINNED",
    "STATE",
    "WEIGHTS",
    "FileSum",
    "Manifest",
    "ModelFacts",
    "Score",
    "TensorForm",
    "best_of",
    "complete",
    "folder_of",
    "read_manifest",
    "state_file",
    "step_of",
]

WEIGHTS, STATE, MANIFEST, PINNED = "weights.safetensors", "state.pt", "manifest.json", "pinned"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of this step."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Returns the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def state_file(rank: int) -> str:
    """Returns the name of a rank's file."""
    return STATE if rank == 0 else f"state-rank{rank}.pt"


def complete(checkpoints: Path) -> list[Path]:
    """Returns the folders of the checkpoints that were committed, the newest first. Raises: OSError."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    return sorted((checkpoints / n for n in names if n.startswith("step-") and ".tmp-" not in n), key=step_of)[::-1]


class FileSum(BaseModel):
    """The size and hash that show whether a file is whole; or the reason why there is none."""

    model_config = ConfigDict(frozen=True)

    bytes: int = 0
    sha256: str = ""
    error: str | None = None


class Score(BaseModel):
    """The results of the test at a checkpoint's step; the first metric says which checkpoint is the best."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    metrics: dict[str, float]
    better: Literal["higher", "lower"]

    @property
    def rank(self) -> float:
        """Higher is better, whatever the metric."""
        first = next(iter(self.metrics.values()))
        return first if self.better == "higher" else -first


class TensorForm(BaseModel):
    """The shape and the dtype of one input of a model."""

    model_config = ConfigDict(frozen=True)

    shape: list[int]
    dtype: str


class ModelFacts(BaseModel):
    """What is needed to build a model again without its data.

    shape: of the data: the address of its class under "kind", and its numbers and texts; "" if it has none. inputs:
    those of the model's call, samples first.
    """

    model_config = ConfigDict(frozen=True)

    shape: dict[str, Any]
    inputs: list[TensorForm]


class Manifest(BaseModel):
    """The origin of a checkpoint, and the sums of its files by name.

    score: None if it was not tested at its step. model: None of an own loop, or if a shape is no dataclass.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    step: int
    attempt: int
    world_size: int
    files: dict[str, FileSum]
    score: Score | None = None
    model: ModelFacts | None = None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @model_validator(mode="before")
    @classmethod
    def _of_one_file(cls, given: Any) -> Any:
        """Reads a manifest of the version before, which had all in state.pt."""
        if isinstance(given, dict) and "sha256" in given:
            rest = {name: value for name, value in given.items() if name not in ("bytes", "sha256")}
            return rest | {"files": {STATE: {"bytes": given["bytes"], "sha256": given["sha256"]}}}
        return given


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest of a checkpoint's folder; None: there is none that makes sense. Raises: OSError."""
    try:
        return read_json(folder / MANIFEST, Manifest)
    except ValidationError:
        return None


def best_of(manifests: Mapping[Path, Manifest | None]) -> Path | None:
    """Returns the checkpoint with the best score, the newest of equal ones; None: none has a score."""
    scored = [(m.score.rank, m.step, path) for path, m in manifests.items() if m is not None and m.score is not None]
    return max(scored)[2] if scored else None

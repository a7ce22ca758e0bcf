"""The folder of a result, and the record of the machine and versions that made it."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "environment", "folder_for", "write"]

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Returns the circumstances of a figure: hardware, versions, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS, capture_output=True, text=True, check=False
    )
    return {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def folder_for(question: str, hardware: str) -> Path:
    """Returns results/<date>_<question>_<hardware>, which it makes if there is none."""
    folder = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}_{question}_{hardware}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(folder: Path, result: dict[str, Any], table: str) -> None:
    """Writes result.json, with the environment, and README.md with the table."""
    document = {"environment": environment(), **result}
    (folder / "result.json").write_text(json.dumps(document, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    (folder / "README.md").write_text(f"{table}\n\nMeasured on: {facts}.\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

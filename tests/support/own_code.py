"""Folders of a user's code, their archives, and small wheels."""

import hashlib
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

RAISES = "raise AssertionError(f'{__name__} is the stranger\\'s')\n"
# Names that packages of ours, of torch and of Python have: whoever imports one of these fails.
STRANGERS = dict.fromkeys(("workers/__init__.py", "service/__init__.py", "torch.py", "ray.py", "typing.py"), RAISES)
MINE = """
import os

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from utils import scale


def model(shape, width):
    print("in", os.getcwd(), "with", os.environ.get("FLAVOUR"), "and", len(os.environ.get("TOKEN", "")), "characters")
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))


class Rows(Dataset):
    def __init__(self, first):
        self.x = scale(torch.randn(256, 4, generator=torch.Generator().manual_seed(first)))

    def __len__(self):
        return 256

    def __getitem__(self, index):
        assert os.environ["FLAVOUR"] == "plain" and os.path.exists("words.txt")
        import utils

        return self.x[index], int(self.x[index].sum() > 0)


def data(**options):
    return Rows(0), Rows(1)


def step(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y)
"""
# MINE's model as it was trained, in a process that sees none of ours and none of the user's.
STRANGER = """
import torch
from safetensors.torch import load_file

weights, x = load_file("weights.safetensors"), torch.randn(7, 4)
expected = torch.tanh(x @ weights["0.weight"].T + weights["0.bias"]) @ weights["2.weight"].T + weights["2.bias"]
print(torch.allclose(torch.jit.load("model.ts")(x), expected, rtol=1e-4, atol=1e-5))
"""
UTILS = "def scale(x):\n    return 2 * x\n"
JOB = """\
name: mine
code: {directory: .}
env: {FLAVOUR: plain}
model: {kind: function, function: "mine:model", options: {width: 8}}
data: {kind: function, function: "mine:data"}
task: {kind: function, function: "mine:step"}
optimizer: {kind: ngd}
schedule: {steps: 6}
batch: {global_size: 64}
checkpoint: {every_steps: 2}
"""


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Returns the folder, with these texts in it by their paths."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def users_folder(folder: Path) -> Path:
    """Returns a folder with a job, its code, and packages that nobody may import."""
    return write(folder, {**STRANGERS, "mine.py": MINE, "utils.py": UTILS, "words.txt": "a\n", "job.yaml": JOB})


def archive_of(folder: Path, archive: Path) -> str:
    """Writes the archive. Returns its SHA-256."""
    with tarfile.open(archive, "w:gz") as files:
        files.add(folder, ".")
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def wheel(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> None:
    """Writes a wheel of one module, whose VERSION tells which it is."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")

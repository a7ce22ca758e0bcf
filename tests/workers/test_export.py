"""Exported models give the outputs of the trained ones, in processes that know nothing of this project."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ngd_workers.contract.checkpoint_files import WEIGHTS, folder_of, read_manifest
from ngd_workers.contract.spec import JobSpec
from ngd_workers.launch.attempt import run_rank
from ngd_workers.launch.export import example, export, rebuilt
from tests.support.attempts import make_attempt, small_spec
from tests.support.texts import write_pairs, write_text

STRANGER = """
import importlib.abc, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ngd_dist", "ngd_workers", "ngd_service", "torchvision", "timm", "transformers"}:
            raise ImportError(name)

sys.meta_path.insert(0, Refused())
import torch
from safetensors.torch import load_file, save_file

given = load_file(sys.argv[2])
model = torch.jit.load(sys.argv[1])
with torch.no_grad():
    save_file({"output": model(*[given[str(i)] for i in range(len(given))]).contiguous()}, sys.argv[3])
"""
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": {"kind": "mlp", "hidden": [8]}},
    "small_cnn": {"model": {"kind": "small_cnn"}},
    "resnet": {"model": {"kind": "torchvision", "name": "resnet18", "stem": "cifar"}},
    "gpt": {"model": {"kind": "gpt", "layers": 1, "width": 8, "heads": 2}},
    "encoder_decoder": {
        "model": {"kind": "encoder_decoder", "encoder_layers": 1, "decoder_layers": 1, "width": 8, "heads": 2}
    },
    "own": {"model": {"kind": "function", "function": "tests.workers.test_export:own", "options": {"width": 5}}},
}


class Own(torch.nn.Module):
    def __init__(self, pixels: int, width: int, classes: int) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(pixels, width), torch.nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.outer(torch.relu(self.inner(x.flatten(1))))
        return logits


def own(shape: Any, width: int) -> torch.nn.Module:
    return Own(shape.channels * shape.height * shape.width, width, shape.classes)


def counts_samples(shape: Any) -> torch.nn.Module:
    class Counting(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float(len(x))

    return Counting(shape.channels * shape.height * shape.width, 4, shape.classes)


def spec_of(name: str, folder: Path) -> JobSpec:
    changes = MODELS[name] | {"schedule": {"steps": 2}, "checkpoint": {"every_steps": 2}}
    if name == "gpt":
        write_text(folder / "text.txt", 60)
        changes |= {
            "data": {
                "kind": "tokens",
                "train": str(folder / "text.txt"),
                "test_fraction": 0.2,
                "length": 8,
                "tokenizer": {"kind": "characters"},
            },
            "task": {"kind": "language_modelling"},
            "batch": {"global_size": 4},
        }
    if name == "encoder_decoder":
        for part in ("train", "val"):
            write_pairs(folder / "pairs", part, 20)
        changes |= {
            "data": {
                "kind": "text_pairs",
                "directory": str(folder / "pairs"),
                "test": "val",
                "source": "en",
                "target": "de",
                "tokenizer": {"kind": "characters"},
            },
            "task": {"kind": "translation"},
            "batch": {"global_size": 4},
        }
    return small_spec(**changes)


def trained(tmp_path: Path, spec: JobSpec) -> Path:
    """Returns a folder as `ngd download` leaves it."""
    outcome = run_rank(make_attempt(tmp_path / "run", spec))
    assert outcome.result == "succeeded", outcome.message
    folder = folder_of(tmp_path / "run" / "checkpoints", 2)
    manifest = read_manifest(folder)
    assert manifest is not None
    facts = None if manifest.model is None else manifest.model.model_dump()
    out = tmp_path / "out"
    out.mkdir()
    (out / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (out / "card.json").write_text(json.dumps({"spec": spec.model_dump(mode="json"), "model": facts}))
    return out


QUICK = ("mlp", "gpt", "own")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_torchscript_needs_torch_alone(tmp_path: Path, name: str) -> None:
    out = trained(tmp_path, spec_of(name, tmp_path))
    path = export(out, "torchscript")

    from safetensors.torch import load_file, save_file

    model, facts = rebuilt(out)
    inputs = example(facts, 5)
    save_file({str(i): x for i, x in enumerate(inputs)}, tmp_path / "in")
    subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, str(path), str(tmp_path / "in"), str(tmp_path / "out.st")], check=True
    )

    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "out.st")["output"], model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_onnx_gives_the_same_outputs(tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out = trained(tmp_path, spec_of(name, tmp_path))
    session = onnxruntime.InferenceSession(str(export(out, "onnx")))

    model, facts = rebuilt(out)
    inputs = example(facts, 7)
    names = [given.name for given in session.get_inputs()]
    (found,) = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})

    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(*inputs), rtol=1e-3, atol=1e-4)


def test_model_that_counts_its_samples_is_not_exported_wrong(tmp_path: Path) -> None:
    model = {"kind": "function", "function": "tests.workers.test_export:counts_samples"}
    out = trained(tmp_path, small_spec(model=model, schedule={"steps": 2}))

    command = [sys.executable, "-m", "ngd_workers.launch.export", str(out), "--format", "torchscript"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert "gives other outputs for 3 samples than for the 2" in ended.stderr
    assert not (out / "model.ts").exists()


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    out = trained(tmp_path, spec_of("mlp", tmp_path))
    card = json.loads((out / "card.json").read_text())
    card["spec"]["model"]["hidden"] = [16]
    (out / "card.json").write_text(json.dumps(card))

    command = [sys.executable, "-m", "ngd_workers.launch.export", str(out), "--format", "torchscript"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert "doesn't fit the model that the job's code builds" in ended.stderr

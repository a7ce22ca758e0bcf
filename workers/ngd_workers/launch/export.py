"""Writes a downloaded model for programs that know nothing of this one: ``python -m ngd_workers.launch.export FOLDER``.

FOLDER holds weights.safetensors and card.json, as `ngd download` leaves them. The model is built again from the card;
what is written is compared with it, on inputs of another number of samples than those that it was written with.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ngd_workers.contract.checkpoint_files import WEIGHTS, ModelFacts
from ngd_workers.contract.errors import SpecError, UserCodeError, WorkerError
from ngd_workers.contract.spec import LoopSpec
from ngd_workers.contract.spec_problems import parse_spec
from ngd_workers.functions import load_function
from ngd_workers.models import build_model

__all__ = ["FORMATS", "example", "export", "main", "rebuilt"]

SAMPLES, OTHER_SAMPLES = 2, 3
SEED = 0
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # another order of sums

Run = Callable[..., Any]


def main() -> None:
    """Exports the model and prints the file's path; a foreseeable failure is one sentence and status 1."""
    parser = argparse.ArgumentParser(prog="python -m ngd_workers.launch.export", description="Export a trained model.")
    parser.add_argument("folder", type=Path, help="folder with weights.safetensors and card.json")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--code", type=Path, help="folder of the job's own code")
    arguments = parser.parse_args()
    if arguments.code is not None:
        sys.path.append(str(arguments.code.resolve()))
    try:
        sys.stdout.write(f"{export(arguments.folder, arguments.format)}\n")
    except WorkerError as error:
        sys.exit(str(error))


def export(folder: Path, kind: str) -> Path:
    """Returns the path of the model in this format, beside its weights. Raises: WorkerError."""
    model, facts = rebuilt(folder)
    path = folder / f"model.{SUFFIXES[kind]}"
    inputs, others = (example(facts, samples) for samples in (SAMPLES, OTHER_SAMPLES))
    try:
        with torch.no_grad():
            run = FORMATS[kind](model, inputs, path)
            expected, found = (_tensors(one(*others)) for one in (model, run))
    except WorkerError:
        raise
    except Exception as error:  # the model's own code may have steps that a format can't hold
        path.unlink(missing_ok=True)
        raise UserCodeError(f"the model can't be written as {kind}: {type(error).__name__}: {error}") from error
    if len(expected) != len(found) or not all(map(_is_close, expected, found)):
        path.unlink()
        raise UserCodeError(
            f"the model as {kind} gives other outputs for {OTHER_SAMPLES} samples than for the {SAMPLES} that it was "
            "written with: its code depends on their number; take another format, or weights.safetensors"
        )
    return path


def rebuilt(folder: Path) -> tuple[nn.Module, ModelFacts]:
    """Returns the model of the card with the weights beside it, in evaluation mode. Raises: WorkerError."""
    card = json.loads((folder / "card.json").read_text())
    spec = parse_spec(card["spec"])
    if isinstance(spec, LoopSpec) or card["model"] is None:
        raise SpecError(
            "the checkpoint does not tell how its model is built: only those of the service's own loop do, on data "
            "whose shape is a dataclass; take --format safetensors"
        )
    facts = ModelFacts.model_validate(card["model"])
    model = build_model(spec.model, _shape(facts.shape))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise UserCodeError(f"{folder / WEIGHTS} doesn't fit the model that the job's code builds: {error}") from error
    return model.eval(), facts


def example(facts: ModelFacts, samples: int) -> tuple[Tensor, ...]:
    """Returns inputs of the forms that the model was called with, for this number of samples."""
    generator = torch.Generator().manual_seed(SEED)
    most = min((value for name, value in facts.shape.items() if "vocabulary" in name), default=2)
    made = []
    for form in facts.inputs:
        size, dtype = (samples, *form.shape[1:]), getattr(torch, form.dtype)
        if dtype.is_floating_point:
            made.append(torch.randn(size, generator=generator).to(dtype))
        else:
            made.append(torch.randint(0, most, size, generator=generator).to(dtype))
    return tuple(made)


def _torchscript(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Run:
    with warnings.catch_warnings():
        # Deprecated in favour of torch.export, whose files one version of torch alone reads.
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.trace(model, inputs, strict=False, check_trace=False), path)
        loaded: Run = torch.jit.load(path)
    return loaded


def _onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Run:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise SpecError(f"format onnx needs {', '.join(missing)}; install ngd-workers[onnx]")
    import onnxruntime

    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model, inputs, dynamo=True, dynamic_shapes=tuple({0: batch} for _ in inputs), verbose=False
    )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(str(path))
    names = [given.name for given in session.get_inputs()]

    def run(*given: Tensor) -> Any:
        arrays = [one.numpy() for one in given]
        return [torch.from_numpy(out) for out in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


FORMATS: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...], Path], Run]] = {
    "torchscript": _torchscript,
    "onnx": _onnx,
}
SUFFIXES = {"torchscript": "ts", "onnx": "onnx"}


def _shape(described: Mapping[str, Any]) -> Any:
    """Returns the shape of the data, as far as a model may read it."""
    if not described["kind"]:
        return None
    kind: Any = load_function(described["kind"])
    given = {name: value for name, value in described.items() if name != "kind"}
    absent = {field.name: str for field in fields(kind) if field.name == "decode"}  # makes text, which no model does
    return kind(**given, **absent)


def _tensors(output: Any) -> list[Tensor]:
    match output:
        case Tensor():
            return [output]
        case Mapping():
            return [tensor for part in output.values() for tensor in _tensors(part)]
        case list() | tuple():
            return [tensor for part in output for tensor in _tensors(part)]
    return []


def _is_close(expected: Tensor, found: Tensor) -> bool:
    return expected.shape == found.shape and torch.allclose(expected, found, **CLOSE, equal_nan=True)


if __name__ == "__main__":
    main()

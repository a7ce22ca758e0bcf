"""First weights from a file, or from another job's checkpoint, in place of random ones."""

import pickle
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import InitChoice, InitFromFile
from ngd_workers.contract.spec_problems import did_you_mean
from ngd_workers.train.continuing import checkpoint_of

__all__ = ["load_first_weights"]

SHOWN_NAMES = 5
WRAPPINGS = ("model", "state_dict")  # ours, Lightning's


def load_first_weights(model: nn.Module, choice: InitChoice, run_dir: Path, data_dir: Path | None) -> None:
    """Copies the weights into the model; those that `choice.ignore` names stay as they are.

    run_dir: this job's own. Raises: DataNotFoundError, InvalidDataError, StorageError; SpecError that lists the names
    that are missing, unexpected or of another shape.
    """
    if isinstance(choice, InitFromFile):
        path = Path(choice.path) if Path(choice.path).is_absolute() else (data_dir or Path()) / choice.path
        source, weights = str(path), _of_file(path)
    else:
        source, weights = _of_checkpoint(run_dir.parent / choice.run_dir, choice.step)
    own = model.state_dict()
    for pattern in choice.ignore:
        if not any(fnmatchcase(name, pattern) for name in (*own, *weights)):
            hint = did_you_mean(pattern, own) or f"its names are like {next(iter(own), '')!r}"
            raise SpecError(f"init_from.ignore: {pattern!r} is no weight of the model or of {source} ({hint})")
    wanted, given = (
        {name: weight for name, weight in all_.items() if not any(fnmatchcase(name, each) for each in choice.ignore)}
        for all_ in (own, weights)
    )
    _check(wanted, given, source)
    with torch.no_grad():
        for name, weight in wanted.items():
            if name in given:  # if not, it is another name of one that is
                weight.copy_(given[name])


def _of_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataNotFoundError(
            f"no file {path} with weights (init_from.path); set NGD_DATA_DIR or --data-dir to the folder that holds "
            "it, or give an absolute path"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InvalidDataError(
            f"can't read the weights in {path}: {str(error).splitlines()[0]}; give a .safetensors file, or a state "
            "dict that torch.save has written"
        ) from error
    for wrapping in WRAPPINGS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    return _tensors(content, str(path))


def _of_checkpoint(run_dir: Path, step: int | None) -> tuple[str, dict[str, Tensor]]:
    checkpoints, step = checkpoint_of(run_dir, step)
    source = str(checkpoints.path(step))
    weights, states = checkpoints.load(step, torch.device("cpu"))
    return source, _tensors(states[0].get("model") if weights is None else weights, source)


def _tensors(content: Any, source: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InvalidDataError(f"{source} must hold a state dict, names and tensors, got {type(content).__name__}")
    return dict(content)


def _check(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises: SpecError unless the names and shapes are the same, apart from other names of a weight that is given."""
    loaded = {_place(weight) for name, weight in own.items() if name in given}
    missing = [name for name, weight in own.items() if name not in given and _place(weight) not in loaded]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} ({list(given[name].shape)}, the model has {list(weight.shape)})"
        for name, weight in own.items()
        if name in given and given[name].shape != weight.shape
    ]
    problems = [
        f"{label}: {_some(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise SpecError(
            f"the weights of {source} don't fit the model; {'; '.join(problems)}; take the model that they were saved "
            "from, or name those that should stay as they are in init_from.ignore"
        )


def _place(weight: Tensor) -> tuple[int, torch.Size]:
    return weight.data_ptr(), weight.shape


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more

"""Goes on from another job's checkpoint: weights, optimizer and step, under settings that may differ."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, optim

from ngd_workers.contract.errors import DataNotFoundError, IncompatibleCheckpointError, SpecError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import InitFromCheckpoint, JobSpec, Plain
from ngd_workers.contract.spec_differences import differences
from ngd_workers.train.checkpoints import Checkpoints

__all__ = ["Origin", "checkpoint_of", "going_on_from", "keep_new_settings", "origin_of"]

log = logging.getLogger(__name__)

# By setting of an optimizer, the entries of its param groups that hold it.
GROUP_ENTRIES = {
    "lr": ("lr", "first_lr", "lr_ratio"),
    "damping": ("damping", "first_damping"),
    "momentum": ("momentum",),
    "nesterov": ("nesterov",),
    "weight_decay": ("weight_decay",),
    "beta1": ("betas",),
    "beta2": ("betas",),
    "eps": ("eps",),
    "trust_coefficient": ("trust_coefficient",),
    "ns_steps": ("ns_steps",),
    "adamw_lr": ("lr", "lr_ratio"),
    "adamw_beta1": ("betas",),
    "adamw_beta2": ("betas",),
    "adamw_eps": ("eps",),
    "adamw_weight_decay": ("weight_decay",),
    "precondition_frequency": ("precondition_frequency",),
}
FREE = frozenset({"name", "init_from", "resources", "failure", "target", "checkpoint", "loading", "code", "env"})


class Origin:
    """The checkpoint of another job, and how that job's settings differ from this one's.

    changed: by dotted path the values there and here, of all settings that have a part in training.
    """

    def __init__(self, checkpoints: Checkpoints, step: int, changed: Mapping[str, tuple[Any, Any]]) -> None:
        self.step, self.changed = step, dict(changed)
        self._checkpoints = checkpoints

    def load(self, device: torch.device) -> tuple[dict[str, Tensor] | None, list[Any]]:
        """Returns weights and states as `Learner.load` takes them. Raises: StorageError."""
        return self._checkpoints.load(self.step, device)

    def __str__(self) -> str:
        differing = [f"{path} {there!r} there, {here!r} here" for path, (there, here) in self.changed.items()]
        return f"step {self.step} of {self._checkpoints.folder.parent.name}; " + (
            "; ".join(differing) or "with the same settings"
        )


def checkpoint_of(run_dir: Path, step: int | None) -> tuple[Checkpoints, int]:
    """Returns the checkpoints of another job, and the step of one that is there; None: the newest whole one.

    Raises: DataNotFoundError, StorageError.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints", attempt=0, keep=1)
    step = step or checkpoints.newest_step()
    if not step or not checkpoints.path(step).is_dir():
        which = f"no checkpoint of step {step}" if step else "no whole checkpoint"
        raise DataNotFoundError(
            f"{which} below {checkpoints.folder} (init_from.run_dir); give the folder of a job that has saved one, and "
            "a step that it has kept"
        )
    return checkpoints, step


def origin_of(choice: InitFromCheckpoint, spec: JobSpec, run_dir: Path) -> Origin:
    """Returns the checkpoint that the choice names. run_dir: this job's own.

    Raises: DataNotFoundError; StorageError; SpecError if its optimizer's state can't go on under this spec.
    """
    other = run_dir.parent / choice.run_dir
    checkpoints, step = checkpoint_of(other, choice.step)
    before = _spec_of(other)
    changed = {} if before is None else _changes(before.model_dump(mode="json"), spec.model_dump(mode="json"))
    if "optimizer.kind" in changed:
        there, here = changed["optimizer.kind"]
        raise SpecError(
            f"init_from.takes everything, and the state of optimizer {there} can't go on under optimizer {here}; take "
            "weights alone (init_from.takes: weights), or keep the optimizer's kind"
        )
    if before is not None and (before.transform is None) != (spec.transform is None):
        there, here = (one.transform.kind if one.transform else "none" for one in (before, spec))
        raise SpecError(
            f"init_from.takes everything, and momentum of transform {there} can't go on under transform {here}; take "
            "weights alone (init_from.takes: weights), or keep transform"
        )
    for name in sorted(spec.optimizer.shapes_state if isinstance(spec.optimizer, Plain) else ()):
        if f"optimizer.{name}" in changed:
            there, here = changed[f"optimizer.{name}"]
            raise SpecError(
                f"init_from.takes everything, and the optimizer's state has the shapes of {name} {there}, got {here}; "
                f"take weights alone (init_from.takes: weights), or keep optimizer.{name}"
            )
    return Origin(checkpoints, step, changed)


def keep_new_settings(optimizer: optim.Optimizer, fresh: list[dict[str, Any]], changed: Mapping[str, Any]) -> None:
    """Puts back the settings of this job that differ from those of the job that the state is from.

    fresh: the param groups as they were before the state was loaded.
    """
    names = [name for name in GROUP_ENTRIES if f"optimizer.{name}" in changed]
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update({entry: new[entry] for name in names for entry in GROUP_ENTRIES[name] if entry in new})


def _spec_of(run_dir: Path) -> JobSpec | None:
    """Returns the spec of the newest attempt below the folder; None: there is none that this version reads."""
    numbers = sorted((int(path.name) for path in run_dir.glob("attempts/*") if path.name.isdecimal()), reverse=True)
    for number in numbers:
        try:
            spec = AttemptDir.of(run_dir, number).read_spec()
        except (OSError, ValidationError, ValueError) as error:
            log.warning("can't read the spec of attempt %d of %s: %s", number, run_dir.name, error)
            continue
        return spec if isinstance(spec, JobSpec) else None
    return None


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    changed = differences([there, here]).items()
    return {path: (before, now) for path, (before, now) in changed if path.partition(".")[0] not in FREE}


@contextmanager
def going_on_from(origin: Origin) -> Iterator[None]:
    """Says of a state that doesn't fit that it is another job's."""
    try:
        yield
    except IncompatibleCheckpointError as error:
        raise IncompatibleCheckpointError(
            f"this job can't go on with the state of {origin}: {error.__cause__}; keep that job's settings, or "
            "take its weights alone (init_from.takes: weights)"
        ) from error

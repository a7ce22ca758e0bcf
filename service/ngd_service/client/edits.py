"""A spec with some settings in the place of others, and one that goes on from another job."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from ngd_service.resources import Job
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import spec_class
from ngd_workers.contract.spec_file import parse_yaml

__all__ = ["continued", "with_settings", "without_defaults"]


def with_settings(spec: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Returns the spec with each of `path=value`: a dotted path, and a value as YAML has it. Raises: SpecError.

    >>> with_settings({"optimizer": {"kind": "sgd", "lr": 1}}, ["optimizer.lr=0.05"])
    {'optimizer': {'kind': 'sgd', 'lr': 0.05}}
    """
    changed = copy.deepcopy(spec)
    for setting in settings:
        path, equals, text = setting.partition("=")
        *outer, last = path.strip().split(".")
        if not equals or not last or not all(outer):
            raise SpecError(f"--set takes path=value, such as optimizer.lr=0.05, got {setting!r}")
        at: Any = changed
        for depth, name in enumerate(outer, start=1):
            at = at.setdefault(name, {})
            if not isinstance(at, dict):
                raise SpecError(f"--set {setting}: {'.'.join(outer[:depth])} is {at!r}, which has no parts")
        at[last] = _value(text, setting)
    return changed


def continued(job: Job, step: int | None) -> dict[str, Any]:
    """Returns a spec that goes on from a checkpoint of the job; step None: from the newest."""
    origin = {"kind": "checkpoint", "run_dir": job.id, "step": step, "takes": "everything"}
    return job.spec | {"init_from": origin}


def without_defaults(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same job in its shortest form; whole, if this version can't read it.

    >>> job = {"name": "a", "model": {"kind": "mlp", "hidden": [128]}, "data": {"kind": "digits", "test_fraction": 0.2},
    ...        "optimizer": {"kind": "sgd", "lr": 0.1}, "schedule": {"steps": 8}, "batch": {"global_size": 8},
    ...        "seed": 0}
    >>> without_defaults(job)["optimizer"], "seed" in without_defaults(job)
    ({'kind': 'sgd'}, False)
    """
    try:
        read = spec_class(spec).model_validate(spec)
    except ValidationError:
        return dict(spec)
    plain = read.model_dump(mode="json", exclude_defaults=True)
    return {name: _with_kinds(part, spec.get(name)) for name, part in plain.items()}


def _with_kinds(plain: Any, full: Any) -> Any:
    """Puts the kinds of choices back, which are defaults of their classes."""
    if isinstance(plain, list) and isinstance(full, list):
        return [_with_kinds(*pair) for pair in zip(plain, full, strict=False)]
    if not isinstance(plain, dict) or not isinstance(full, Mapping):
        return plain
    kind = {"kind": full["kind"]} if "kind" in full else {}
    return kind | {name: _with_kinds(part, full.get(name)) for name, part in plain.items()}


def _value(text: str, setting: str) -> Any:
    try:
        value: Any = parse_yaml(f"value: {text}\n".encode())
    except ValueError as error:
        raise SpecError(f"--set {setting}: the value is no YAML: {error}") from error
    return value["value"]

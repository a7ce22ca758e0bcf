"""Who owns a field of an object: server-side apply and other writers, as Kubernetes documents them.

Every list is one field here, which is right of custom resources without list types, such as KubeRay's; the lists of
built-in kinds, which have keys, are owned more finely by a real server.
"""

import copy
from typing import Any

from tests.support.chart import Object

Path = tuple[str, ...]
APPLY, UPDATE = "Apply", "Update"
UNOWNED = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}


class ConflictError(Exception):
    """str() is as Kubernetes says it."""


def server_side_apply(live: Object | None, config: Object, manager: str, *, force: bool = False) -> Object:
    """Returns the object after `manager` has applied its configuration. Raises: ConflictError."""
    wanted = _leaves(config)
    merged = copy.deepcopy(live) if live else {}
    owned = _owned(merged)
    conflicts = {
        (other, path)
        for (other, kind), paths in owned.items()
        for path in paths & wanted.keys()
        if (other, kind) != (manager, APPLY) and _at(merged, path) != wanted[path]
    }
    if conflicts and not force:
        said = ", ".join(f'conflict with "{other}": .{".".join(path)}' for other, path in sorted(conflicts))
        raise ConflictError(f"Apply failed with {len(conflicts)} conflict: {said}")
    for other, path in conflicts:
        owned[other, UPDATE].discard(path)
    before = owned.pop((manager, APPLY), set())
    held_by_others = set().union(*owned.values())
    for path in before - wanted.keys() - held_by_others:
        _remove(merged, path)
    for path, value in wanted.items():
        _put(merged, path, value)
    owned[manager, APPLY] = set(wanted) - UNOWNED
    return defaulted(merged | {"metadata": merged["metadata"] | {"managedFields": _managed_fields(owned)}})


def update(live: Object, path: Path, value: object, manager: str) -> Object:
    """Returns the object after `manager` has written one field, which is its own from then on."""
    changed = copy.deepcopy(live)
    owned = _owned(changed)
    for paths in owned.values():
        paths.discard(path)
    owned.setdefault((manager, UPDATE), set()).add(path)
    _put(changed, path, value)
    return changed | {"metadata": changed["metadata"] | {"managedFields": _managed_fields(owned)}}


def defaulted(content: Object) -> Object:
    """Returns the object with what the API server fills in where nothing is said."""
    content = copy.deepcopy(content)
    if content.get("kind") == "Deployment":
        content["spec"].setdefault("replicas", 1)
    if content.get("kind") == "RayCluster":
        for group in content["spec"]["workerGroupSpecs"]:
            for name, value in {"replicas": 0, "numOfHosts": 1, "priority": 0}.items():
                group.setdefault(name, value)
            for container in group["template"]["spec"]["containers"]:
                for port in container.get("ports", []):
                    port.setdefault("protocol", "TCP")
    return content


def _leaves(content: Object, path: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            found |= _leaves(value, (*path, name))
        else:
            found[*path, name] = value
    return found


def _owned(content: Object) -> dict[tuple[str, str], set[Path]]:
    return {
        (entry["manager"], entry["operation"]): {
            tuple(name.removeprefix("f:") for name in path) for path in _leaves(entry["fieldsV1"])
        }
        for entry in content.get("metadata", {}).get("managedFields", [])
    }


def _managed_fields(owned: dict[tuple[str, str], set[Path]]) -> list[Object]:
    entries = []
    for (manager, operation), paths in owned.items():
        fields: Object = {}
        for path in paths:
            _put(fields, tuple(f"f:{name}" for name in path), {})
        entries.append({"manager": manager, "operation": operation, "fieldsV1": fields})
    return entries


def _at(content: Any, path: Path) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _put(content: Object, path: Path, value: object) -> None:
    for name in path[:-1]:
        content = content.setdefault(name, {})
    content[path[-1]] = value


def _remove(content: Object, path: Path) -> None:
    holder = _at(content, path[:-1])
    if isinstance(holder, dict):
        holder.pop(path[-1], None)

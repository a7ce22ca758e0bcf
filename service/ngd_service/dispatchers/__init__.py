"""How attempts start: one file per dispatcher, with its settings. Start at base.py, the contract.

A dispatcher is one file and one line here; NGD_DISPATCHER names it. One of another package is named by its class,
package.module:Class, and has no line here.
"""

from importlib import import_module
from typing import Any

from ngd_service.dispatchers.base import Dispatcher
from ngd_service.dispatchers.kuberay import KubeRayDispatcher
from ngd_service.dispatchers.local import LocalDispatcher
from ngd_service.dispatchers.ray_jobs import RayJobsDispatcher
from ngd_service.errors import StartupError

__all__ = ["DISPATCHERS", "dispatcher_named"]

DISPATCHERS: dict[str, type[Dispatcher[Any]]] = {
    "local": LocalDispatcher,
    "ray_jobs": RayJobsDispatcher,
    "kuberay": KubeRayDispatcher,
}


def dispatcher_named(name: str) -> type[Dispatcher[Any]]:
    """Returns the dispatcher's class. name: a key of DISPATCHERS, or package.module:Class. Raises: StartupError."""
    if name in DISPATCHERS:
        return DISPATCHERS[name]
    module, _, attribute = name.partition(":")
    try:
        named = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise StartupError(
            f"the dispatcher {name} (NGD_DISPATCHER) can't be imported: {error}; install its package beside the service"
        ) from error
    if not (isinstance(named, type) and issubclass(named, Dispatcher)):
        raise StartupError(
            f"the dispatcher {name} (NGD_DISPATCHER) must be a class derived from Dispatcher of "
            "ngd_service.dispatchers.base"
        )
    return named

"""How attempts start: one file per place they run at. Start at base.py, the contract.

A place is one file and one line here; NGD_DISPATCHER names it.
"""

from collections.abc import Callable

from service.dispatchers.base import Dispatcher
from service.dispatchers.files import AttemptFiles
from service.dispatchers.kuberay import KubeRayDispatcher
from service.dispatchers.local import LocalDispatcher
from service.dispatchers.ray_jobs import RayJobsDispatcher
from service.failpoint import Failpoint
from service.settings import Settings

__all__ = ["DISPATCHERS"]

# Each makes its dispatcher from the settings. Raises: StartupError
DISPATCHERS: dict[str, Callable[[Settings, AttemptFiles, Failpoint], Dispatcher]] = {
    "local": LocalDispatcher.of,
    "ray_jobs": RayJobsDispatcher.of,
    "kuberay": KubeRayDispatcher.of,
}

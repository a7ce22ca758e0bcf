"""How attempts start: one file per place they run at. Start at base.py, the contract.

A place is one file and one line here; NGD_DISPATCHER names it.
"""

from collections.abc import Callable

from ngd_service.dispatchers.base import Dispatcher
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.dispatchers.kuberay import KubeRayDispatcher
from ngd_service.dispatchers.local import LocalDispatcher
from ngd_service.dispatchers.ray_jobs import RayJobsDispatcher
from ngd_service.failpoint import Failpoint
from ngd_service.settings import Settings

__all__ = ["DISPATCHERS"]

# Each makes its dispatcher from the settings. Raises: StartupError
DISPATCHERS: dict[str, Callable[[Settings, AttemptFiles, Failpoint], Dispatcher]] = {
    "local": LocalDispatcher.of,
    "ray_jobs": RayJobsDispatcher.of,
    "kuberay": KubeRayDispatcher.of,
}

"""`ngd serve` whose attempts other controllers see too, as on a cluster; NGD_RUNS_DIR is the folder they share.

    python -m tests.support.shared_service

On one machine the local dispatcher finds the processes that another controller has started, so that it stands in for
NGD_DISPATCHER=ray_jobs here.
"""

from ngd_service.cli.commands import main
from ngd_service.dispatchers import DISPATCHERS
from ngd_service.dispatchers.local import LocalDispatcher
from ngd_service.dispatchers.ray_jobs import RayJobsSettings


class SharedDispatcher(LocalDispatcher):
    settings_class = RayJobsSettings
    owns_processes = False
    ray = "given"


if __name__ == "__main__":
    DISPATCHERS["ray_jobs"] = SharedDispatcher
    main(["serve"])

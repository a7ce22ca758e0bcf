"""The Ray cluster of an attempt: its own, on this machine and for this attempt alone, or the one that runs the driver.

Ray is imported late: that takes seconds, in which the driver already heeds signals.
"""

import logging
import os
import shutil
import tempfile
from types import TracebackType
from typing import Any, Literal, Self

from workers.errors import ClusterError, SpecError
from workers.spec import JobSpec, Resources

__all__ = ["RayCluster"]

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 1024**2  # nothing large goes through Ray; its default is 30 % of the memory
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",  # the log is a file
    "RAY_DEDUP_LOGS": "0",  # each rank's lines in full
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nothing here acts on a notice: a lost worker costs up to a checkpoint
}
OWN_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # Ray's default, said aloud: leaving it out makes Ray warn in the job's log
    # Ray's cleaner asks the dashboard, which is off, and without an address trips over any second Ray on the machine.
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class RayCluster:
    """Gives the driver a Ray to train on, from `start` until the context is left."""

    def __init__(self, kind: Literal["own", "given"]) -> None:
        self._kind = kind
        self._temporary: str | None = None
        os.environ.update(SETTINGS | (OWN_SETTINGS if kind == "own" else {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def start(self, spec: JobSpec) -> None:
        """Raises: ClusterError if there is no Ray."""
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        quiet: dict[str, Any] = {"logging_config": ray.LoggingConfig(log_level="ERROR"), "log_to_driver": True}
        try:
            if self._kind == "given":
                ray.init(address="auto", **quiet)
            else:
                self._start_own(spec.resources, quiet)
        except (RuntimeError, ConnectionError, OSError, ValueError) as error:
            where = "did not start on this machine" if self._kind == "own" else "that runs the driver does not answer"
            raise ClusterError(f"Ray {where}: {error}") from error

    def check(self, spec: JobSpec) -> None:
        """Raises: SpecError for more GPUs than a machine of its own has. A given cluster may grow: it is waited for."""
        import ray

        resources, found = spec.resources, ray.cluster_resources()
        wanted = {
            "CPU": resources.workers * resources.threads_per_worker,
            "GPU": resources.workers * resources.gpus_per_worker,
        }
        short = {name: count for name, count in wanted.items() if found.get(name, 0) < count}
        if self._kind == "given":
            for name, count in short.items():
                log.warning("waiting for %d %ss in all; the Ray cluster has %g", count, name, found.get(name, 0))
        elif "GPU" in short:
            raise SpecError(
                f"resources ask for {wanted['GPU']} GPUs (workers {resources.workers} x gpus_per_worker "
                f"{resources.gpus_per_worker}), this machine has {found.get('GPU', 0):g}; lower them"
            )

    def _start_own(self, resources: Resources, quiet: dict[str, Any]) -> None:
        import ray

        # A socket's path may have 107 bytes, and Ray puts some 60 of its own below this.
        self._temporary = tempfile.mkdtemp(prefix="ngd-", dir="/tmp")
        ray.init(
            address="local",
            num_cpus=resources.workers * resources.threads_per_worker,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=self._temporary,
            **quiet,
        )

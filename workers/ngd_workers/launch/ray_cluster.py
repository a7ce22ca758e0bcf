"""The Ray cluster of an attempt: its own, on this machine and for this attempt alone, or the one that runs the driver.

Ray takes seconds to import. It is imported late, so that the driver handles signals in that time.
"""

import contextlib
import functools
import logging
import os
import random
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from unittest import mock

from ngd_workers.contract.errors import RayStartError, SpecError
from ngd_workers.contract.spec import Job, Resources
from ngd_workers.launch.groups import Room

__all__ = ["RayCluster", "bundle", "free_ports"]

log = logging.getLogger(__name__)

LOOK_S = 5.0
TRIAL_S = 5.0  # for Ray to place workers that have room
MESSAGE_CHARACTERS = 500
FATAL = re.compile(r"^\[[^]]* [CF] [^]]*\] \(\w+\) \S+: +")  # of Ray's C++ code: time, severity, process, file
OBJECT_STORE_BYTES = 100 * 1024**2  # nothing large goes through Ray; its default is 30 % of the memory
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",  # the log is a file
    "RAY_DEDUP_LOGS": "0",  # each rank's lines in full
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `groups` looks for notices itself
}
OWN_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # Ray's default; if it is left out, Ray warns in the job's log
    # Ray's clean-up asks the dashboard, which is off; without an address it fails if a second Ray runs on the machine.
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # otherwise each surviving rank prints a C++ stack
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

    def start(self, resources: Resources) -> None:
        """Connects to the given cluster, or starts the attempt's own. Raises: RayStartError."""
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        quiet: dict[str, Any] = {"logging_config": ray.LoggingConfig(log_level="ERROR"), "log_to_driver": True}
        try:
            if self._kind == "given":
                ray.init(address="auto", **quiet)
            else:
                self._start_own(resources, quiet)
        except Exception as error:  # Ray raises nothing more specific if its processes do not start
            raise RayStartError(self._why_not(error)) from error

    def check(self, spec: Job) -> None:
        """Raises: SpecError if the job wants more GPUs than this machine has. A given cluster may grow: no check."""
        import ray

        resources, num_gpus, fewest = spec.resources, ray.cluster_resources().get("GPU", 0), spec.sizes[0]
        wanted = fewest * resources.gpus_per_worker
        if self._kind == "own" and wanted > num_gpus:
            setting = "min_workers" if resources.is_elastic else "workers"
            raise SpecError(
                f"resources ask for {wanted} GPUs ({setting} {fewest} x gpus_per_worker "
                f"{resources.gpus_per_worker}), this machine has {num_gpus:g}; lower them"
            )

    @property
    def changes(self) -> bool:
        """Whether nodes may come and go."""
        return self._kind == "given"

    def largest_size(self, job: Job, tell: Callable[[str | None], None], is_stopped: Callable[[], bool]) -> int | None:
        """Returns the largest of the job's sizes that the cluster has room for now; None if the attempt is stopped.

        Waits for the smallest, and holds its room while it tries the others. tell: called with the shortage while it
        lasts, and with None at the end. Ray Train would wait too, but silently and with a traceback each minute.
        """
        if self._kind == "own":
            return max((size for size in job.sizes if size <= _most(job.resources)), default=job.sizes[0])
        fewest, *larger = job.sizes
        with contextlib.closing(_PlacedRoom(job, fewest)) as room:
            while not room.is_there(LOOK_S):
                if is_stopped():
                    return None
                tell(_what_is_short(job.resources, fewest))
            tell(None)
            most = _most(job.resources)
            for size in sorted((size for size in larger if size <= most), reverse=True):
                with contextlib.closing(_PlacedRoom(job, size - fewest)) as more:
                    if more.is_there(TRIAL_S):
                        return size
        return fewest

    def request(self, job: Job, workers: int) -> Room:
        """Returns a standing request for room for so many more workers."""
        return _PlacedRoom(job, workers)

    def draining(self, nodes: Sequence[str]) -> list[str]:
        """Returns the addresses of those of the nodes that are to be taken away. nodes: Ray's ids."""
        import ray

        # Ray Train's own watcher asks here. Its public `get_preemption_info` is a barrier of all workers.
        leaving = set(ray._private.state.state.get_draining_nodes()).intersection(nodes)
        return [f"node {node['NodeManagerAddress']}" for node in ray.nodes() if node["NodeID"] in leaving]

    def _start_own(self, resources: Resources, quiet: dict[str, Any]) -> None:
        import ray
        from ray._private import parameter

        # A socket's path may have 107 bytes, and Ray adds some 60 to this one.
        self._temporary = tempfile.mkdtemp(prefix="ngd-", dir="/tmp")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it each of Ray's processes would compile Ray again
        # With given ports the raylet need not wait until its agents have chosen some: it dies if they start slowly
        # (https://github.com/ray-project/ray/issues/65983), and ray.init has no arguments for these.
        metrics, metrics_export, runtime_env, listen = free_ports(4)
        ports = {"metrics_agent_port": metrics, "runtime_env_agent_port": runtime_env}
        given = functools.partial(parameter.RayParams, dashboard_agent_listen_port=listen, **ports)
        with mock.patch.object(parameter, "RayParams", given):
            ray.init(
                address="local",
                num_cpus=resources.workers * resources.threads_per_worker,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._temporary,
                _metrics_export_port=metrics_export,
                **quiet,
            )

    def _why_not(self, error: Exception) -> str:
        if self._kind == "given":
            return f"the Ray cluster that runs the driver does not answer: {error}"
        return f"Ray did not start on this machine: {_fatal_line(self._temporary) or error}"


class _PlacedRoom:
    """A placement group: an autoscaler sees it, and it reserves nothing until it can reserve everything."""

    def __init__(self, job: Job, workers: int) -> None:
        from ray.util import placement_group

        self._group = placement_group([bundle(job.resources)] * workers, strategy="PACK")

    def is_there(self, timeout_s: float = 0.0) -> bool:
        return bool(self._group.wait(timeout_s))

    def close(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self._group)


def free_ports(count: int) -> list[int]:
    """Returns `count` free ports, all below the range from which the kernel takes the ports of connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


def bundle(resources: Resources) -> dict[str, float]:
    """Returns the resources that one worker reserves, by Ray's names."""
    gpus = {"GPU": float(resources.gpus_per_worker)} if resources.gpus_per_worker else {}
    return {"CPU": float(resources.threads_per_worker)} | gpus


def _most(resources: Resources) -> int:
    """Returns how many workers the cluster's nodes hold, if nothing else is on them."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) // each) for name, each in bundle(resources).items()) for node in alive)


def _what_is_short(resources: Resources, workers: int) -> str:
    import ray

    setting = "min_workers" if resources.is_elastic else "workers"
    total, free = ray.cluster_resources(), ray.available_resources()
    each = {"CPU": resources.threads_per_worker, "GPU": resources.gpus_per_worker}
    wanted = {name: workers * count for name, count in each.items() if count}
    for name, count in wanted.items():
        if total.get(name, 0) < count:
            return (
                f"waiting for {count} {name}s ({setting} {workers} x {each[name]}): the Ray cluster has "
                f"{total.get(name, 0):g} in all; add nodes, or cancel the job and ask for less"
            )
    for name, count in wanted.items():
        if free.get(name, 0) < count:
            return (
                f"waiting for {count} {name}s: {free.get(name, 0):g} of the Ray cluster's {total[name]:g} are free, "
                "others hold the rest"
            )
    return "waiting for nodes with room for a whole worker each: the Ray cluster's free CPUs and GPUs are scattered"


def _fatal_line(temporary: str | None) -> str | None:
    """Returns the last fatal line in the logs of Ray's processes; Ray's exception says only that they ended."""
    if temporary is None:
        return None
    for name in ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out"):
        for path in Path(temporary).glob(f"session_*/logs/{name}"):
            with contextlib.suppress(OSError):
                fatal = [line for line in path.read_text(errors="replace").splitlines() if FATAL.search(line)]
                if fatal:
                    return FATAL.sub("", fatal[-1]).strip()[:MESSAGE_CHARACTERS]
    return None

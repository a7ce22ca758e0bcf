"""A real Ray head with token authentication on its own ports, ended by pid: `ray stop` would end every Ray here."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import psutil

from ngd_workers.launch.ray_cluster import free_ports
from tests.support import ROOT
from tests.support.deadline import wait_until

__all__ = ["RayHead"]

START_S = 120.0
OBJECT_STORE_BYTES = 100 * 1024**2


class RayHead:
    """The head of a Ray cluster of num_cpus, and its only node unless others are added."""

    def __init__(self, num_cpus: int = 2, *, in_place_of: "RayHead | None" = None) -> None:
        """in_place_of: a head that has ended, whose address and token this one takes over."""
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path may have 107 bytes
        self.token_file = self._folder / "auth_token"
        self.token = secrets.token_hex(32) if in_place_of is None else in_place_of.token
        self.token_file.write_text(self.token)
        gcs, dashboard, client, agent, agent_grpc, runtime_env, metrics = free_ports(7)
        if in_place_of is not None:
            dashboard = in_place_of.dashboard
        self.dashboard = dashboard
        self.address = f"http://127.0.0.1:{dashboard}"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"),
            f"--dashboard-port={dashboard}",
            # Given its agents' ports the raylet does not wait for them, 15 s at most: a busy machine takes longer.
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
            *(f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}"),
            *(f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            f"--temp-dir={self._folder / 'ray'}",
        ]
        self._gcs = gcs
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._by_id: dict[str, subprocess.Popen[bytes]] = {}
        self._settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "PYTHONWARNINGS": "ignore",
        }
        self._output = self._folder / "head.txt"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=_environment() | self._settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until(lambda: self._process.poll() is not None or self._answers(), "Ray is up", timeout_s=START_S)
        except BaseException:
            self.close()
            raise
        assert self._process.poll() is None, self._output.read_text()

    def add_node(self, folder: Path, num_cpus: int = 1) -> str:
        """Adds a node on this machine that was started in the folder. Returns Ray's id of it."""
        wait_until(self.nodes, "the head has joined", timeout_s=START_S)
        known = self.nodes()
        listen, agent_grpc, runtime_env, metrics, manager = free_ports(5)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address=127.0.0.1:{self._gcs}", "--block"),
            *("--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}"),
            # The range of a head on the same machine would be used twice.
            *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            *(f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={agent_grpc}"),
            *(f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}"),
            f"--node-manager-port={manager}",
        ]
        with (self._folder / f"node-{len(self._nodes)}.txt").open("wb") as output:
            node = subprocess.Popen(
                command,
                cwd=folder,
                env=_environment() | self._settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._nodes.append(node)  # one after the other: two that start at once wait for each other
        wait_until(lambda: self.nodes() - known, "the node has joined", timeout_s=START_S)
        (added,) = self.nodes() - known
        self._by_id[added] = node
        return added

    def kill_node(self, node_id: str) -> None:
        """Kills a node with all that runs on it, as the loss of its machine does."""
        _kill(self._by_id[node_id])

    def kill_worker(self, node_id: str) -> None:
        """Kills one of the processes that train on the node, as the kernel does when there is no memory left."""
        below = psutil.Process(self._by_id[node_id].pid).children(recursive=True)
        next(process for process in below if "RayTrainWorker" in " ".join(process.cmdline())).kill()

    def kill(self) -> None:
        """Kills the head with all that runs on it; the nodes stay, for as long as they wait for another head."""
        _kill(self._process)

    def drain_node(self, node_id: str, within_s: int = 600) -> None:
        """Says that the node is to be taken away."""
        subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address=127.0.0.1:{self._gcs}"),
                *(f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test"),
                f"--deadline-remaining-seconds={within_s}",
            ],
            env=_environment() | self._settings,
            check=True,
            capture_output=True,
            timeout=START_S,
        )

    def nodes(self) -> set[str]:
        """Returns Ray's ids of the nodes that are alive, the head's among them."""
        nodes = self._call("GET", "/api/v0/nodes").json()["data"]["result"]["result"]
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    @property
    def environment(self) -> dict[str, str]:
        """Returns the variables by which a driver finds this cluster, as Ray sets them where it runs drivers."""
        return self._settings | {"RAY_ADDRESS": f"127.0.0.1:{self._gcs}"}

    def close(self) -> None:
        """Ends the head, the nodes, and all that they have started, at once."""
        for process in (self._process, *self._nodes):
            _kill(process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, method: str, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.request(method, self.address + path, headers=headers, trust_env=False, timeout=30)

    def _answers(self) -> bool:
        try:
            return self._call("GET", "/api/jobs/").is_success
        except httpx.RequestError:
            return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and all that it has started. Those of a process that has ended are gone with it."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid)
    processes = [*started.children(recursive=True), started]
    for one in processes:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=30)
    psutil.wait_procs(processes, timeout=30)


def _environment() -> dict[str, str]:
    """What a head would see on a machine of its own: no address of another Ray, and bytecode that is compiled once."""
    given = os.environ.get("PYTHONPATH")  # an empty part would be the present folder
    path = os.pathsep.join([str(ROOT), given] if given else [str(ROOT)])
    left_out = {name for name in os.environ if name.startswith("RAY_")} | {"PYTHONDONTWRITEBYTECODE"}
    return {name: value for name, value in os.environ.items() if name not in left_out} | {"PYTHONPATH": path}

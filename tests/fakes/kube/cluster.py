"""A Kubernetes with KubeRay, as two processes that can be ended and started again; pods outlive both."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.fakes.kube.kuberay import Behaviour
from tests.support.deadline import wait_until

TOKEN = "a-service-account-s-token"
NAMESPACE = "training"
TEMPLATE: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}},
    "spec": {
        "rayClusterSpec": {
            "rayVersion": "2.60.0",
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0"},
                "template": {"spec": {"containers": [{"name": "ray-head", "image": "worker"}]}},
            },
            "workerGroupSpecs": [
                {
                    "groupName": "cpu",
                    "rayStartParams": {},
                    "minReplicas": 0,
                    "maxReplicas": 4,
                    "template": {
                        "spec": {
                            "containers": [
                                {
                                    "name": "ray-worker",
                                    "image": "worker",
                                    "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
                                    "resources": {"limits": {"cpu": "4", "memory": "8Gi"}},
                                }
                            ]
                        }
                    },
                }
            ],
        }
    },
}


class KubeCluster:
    """Both processes, and the files by which clients find them: `kubeconfig` and `template`."""

    def __init__(self, folder: Path, *, history: int = 500, **behaviour: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.history = history
        self.behaviour = Behaviour(**behaviour)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self._kubeconfig()))
        self.template = folder / "rayjob.yaml"
        self.template.write_text(yaml.safe_dump(TEMPLATE))
        self.server: subprocess.Popen[bytes] | None = None
        self.operator: subprocess.Popen[bytes] | None = None

    def start(self) -> "KubeCluster":
        self.start_server()
        self.start_operator()
        return self

    def start_server(self) -> None:
        command = ["tests.fakes.kube.kubernetes", str(self.port), TOKEN, str(self.folder / "objects.json")]
        self.server = self._spawn("server.txt", *command, str(self.history))
        wait_until(self._answers, "the API server answers", timeout_s=60)

    def start_operator(self) -> None:
        pods, behaviour = str(self.folder / "pods"), json.dumps(asdict(self.behaviour))
        self.operator = self._spawn(
            "operator.txt", "tests.fakes.kube.kuberay", self.url, TOKEN, NAMESPACE, pods, behaviour
        )

    def stop_server(self) -> None:
        _end(self.server)
        self.server = None

    def stop_operator(self) -> None:
        _end(self.operator)
        self.operator = None

    def stop(self) -> None:
        """Ends both and every pod."""
        self.stop_operator()
        self.stop_server()
        for pid in self.folder.glob("pods/*/pid"):
            if not (pid.parent / "exit").exists():
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.killpg(int(pid.read_text()), signal.SIGKILL)
        self.http.close()

    def misbehave(self, *faults: dict[str, Any]) -> None:
        """Plans what the server does instead of answering; see `kubernetes.Faults`. Without faults: nothing."""
        self.http.put("/faults", json=list(faults)).raise_for_status()

    def limit_rayjobs(self, number: int | None) -> None:
        """Sets the namespace's quota."""
        self.http.put("/quota", json={"rayjobs": number}).raise_for_status()

    def lose_node(self, name: str) -> None:
        """Ends all that runs of a RayJob's pods; what Kubernetes knows of them stays, as when their node has died."""
        pods = self.folder / "pods" / self.get(name)["metadata"]["uid"]
        (pods / "lost").touch()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int((pods / "pid").read_text()), signal.SIGKILL)

    def faults_left(self) -> int:
        return sum(fault["times"] for fault in self.http.get("/faults").raise_for_status().json())

    @property
    def collection(self) -> str:
        return f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"

    @property
    def settings(self) -> dict[str, str]:
        """Returns what a controller needs to be told, beside KUBECONFIG."""
        return {"dispatcher": "kuberay", "rayjob_template": str(self.template)}

    def times_created(self) -> dict[str, int]:
        """Returns how often a RayJob of each name was ever created."""
        return dict(self.http.get("/created").raise_for_status().json())

    def rayjobs(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.http.get(self.collection).raise_for_status().json()["items"]
        return items

    def clusters_started(self) -> int:
        """Returns how many Ray clusters were ever made, one for each RayJob that was taken up."""
        return len(list(self.folder.glob("pods/*")))

    def clear(self) -> None:
        """Brings it back to where it was after `start`: both processes up, no faults, no RayJobs, no pods."""
        if self.server is None:
            self.start_server()
        self.misbehave()
        self.limit_rayjobs(None)
        for lost in self.folder.glob("pods/*/lost"):
            lost.unlink()
        if self.operator is None:
            self.start_operator()
        for rayjob in self.rayjobs():
            self.delete(rayjob["metadata"]["name"])
        wait_until(lambda: not self.rayjobs(), "all RayJobs are gone")

    def get(self, name: str) -> dict[str, Any]:
        return dict(self.http.get(f"{self.collection}/{name}").raise_for_status().json())

    def delete(self, name: str, propagation: str = "Foreground") -> None:
        self.http.request("DELETE", f"{self.collection}/{name}", json={"propagationPolicy": propagation})

    def report(self, name: str, **status: object) -> None:
        """Writes the RayJob's status, as its operator would."""
        path = f"{self.collection}/{name}/status"
        self.http.patch(path, json={"status": status}).raise_for_status()

    def run_as_head(self, entrypoint: str) -> int:
        """Runs it as the head of a Ray cluster runs what was submitted, to its end. Returns its exit status."""
        return subprocess.run(["bash", "-c", entrypoint], timeout=60, check=False).returncode

    def _answers(self) -> bool:
        assert self.server is not None
        assert self.server.poll() is None, (self.folder / "server.txt").read_text()
        try:
            return self.http.get(self.collection).is_success
        except httpx.HTTPError:
            return False

    def _spawn(self, output: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / output).open("ab") as file:
            return subprocess.Popen([sys.executable, "-m", *arguments], stdout=file, stderr=file)

    def _kubeconfig(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
        }


def _end(process: "subprocess.Popen[bytes] | None") -> None:
    if process is not None:
        process.kill()
        process.wait()

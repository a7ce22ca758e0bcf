"""KubeRay's operator as far as a RayJob's author can tell, over the API alone; its pods are processes of this machine.

    python -m tests.fakes.kube.kuberay URL TOKEN NAMESPACE PODS_DIR [JSON of `Behaviour`]

Pods outlive the operator, and a second operator finds them: PODS_DIR/<uid>/ holds pid and exit status, and `lost` if
their node has died: nothing of them runs any more, and they stay, for nobody can say that they have ended.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

from tests.fakes.kube.rayjob_schema import FOREGROUND, Json

FINALIZER = "ray.io/rayjob-finalizer"
MAX_NAME = 47  # KubeRay appends to it for the RayCluster and its services
DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
LOOK_S = 0.1
TERMINAL = ("Complete", "Failed", "ValidationFailed")


@dataclass(frozen=True)
class Behaviour:
    """How slow the cluster is."""

    starts_after_s: float = 0.1  # from Initializing to Running
    pods_linger_s: float = 0.3  # how long pods go on after they were told to end


class Pods:
    """The Ray cluster of one RayJob: the driver's shell and all it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, entrypoint: str) -> None:
        """Submits it as a Ray job of that id is submitted: once."""
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(parents=True)
            ends = f"echo $? > {self.folder}/exit.tmp; mv {self.folder}/exit.tmp {self.folder}/exit"
            script = f"echo $$ > {self.folder}/pid; {entrypoint}\n{ends}"
            with (self.folder / "output").open("wb") as output:
                subprocess.Popen(["bash", "-c", script], stdout=output, stderr=output, start_new_session=True)

    @property
    def exit_status(self) -> int | None:
        """Returns None while it runs; 137 if it is gone without one."""
        if (self.folder / "exit").exists():
            return int((self.folder / "exit").read_text())
        return None if self.is_alive() else 137

    @property
    def is_lost(self) -> bool:
        return (self.folder / "lost").exists()

    @property
    def are_there(self) -> bool:
        """Whether Kubernetes still has them."""
        return self.is_lost or (self.is_alive() and not (self.folder / "exit").exists())

    def is_alive(self) -> bool:
        pid = self.folder / "pid"
        if not self.folder.exists():
            return False
        if not pid.exists() or not pid.read_text().strip():
            return True  # it is about to write it
        group = int(pid.read_text())
        try:
            shell = psutil.Process(group)
            with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                os.waitpid(group, os.WNOHANG)
            return shell.is_running() and shell.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def end(self) -> None:
        pid = self.folder / "pid"
        if pid.exists() and not (self.folder / "exit").exists():
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


class Operator:
    def __init__(self, url: str, token: str, namespace: str, pods_dir: Path, behaviour: Behaviour) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=10)
        self.collection = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self.pods_dir = pods_dir
        self.behaviour = behaviour
        self.changed = threading.Event()
        self.told_to_end: dict[str, float] = {}  # pods by uid, and when they were

    def run(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()
        while True:
            self.changed.wait(LOOK_S)
            self.changed.clear()
            with contextlib.suppress(httpx.HTTPError):
                items = self.http.get(self.collection).raise_for_status().json()["items"]
                for content in items:
                    with contextlib.suppress(httpx.HTTPStatusError):  # written by another hand since: next time
                        self.reconcile(content)
                self._collect({content["metadata"]["uid"] for content in items})

    def _watch(self) -> None:
        version = ""
        while True:
            try:
                query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "5"}
                with self.http.stream("GET", self.collection, params=query) as stream:
                    for line in stream.raise_for_status().iter_lines():
                        event = json.loads(line)
                        is_gone = event["type"] == "ERROR"
                        version = "" if is_gone else event["object"]["metadata"]["resourceVersion"]
                        self.changed.set()
            except httpx.HTTPError:
                time.sleep(LOOK_S)

    def reconcile(self, content: Json) -> None:
        metadata, status = content["metadata"], content.get("status", {})
        if "deletionTimestamp" in metadata:
            self._delete(content)
            return
        refusal = why_invalid(content)
        state = status.get("jobDeploymentStatus", "")
        if refusal and state != "ValidationFailed":
            self._report(content, jobDeploymentStatus="ValidationFailed", reason="ValidationFailed", message=refusal)
        elif refusal:
            return
        elif state == "":
            self._take_up(content)
        elif state == "Initializing":
            if content["spec"].get("suspend"):
                self._report(content, jobDeploymentStatus="Suspended")
            elif age_s(status["startTime"]) >= self.behaviour.starts_after_s:
                self._pods(content).run(content["spec"]["entrypoint"])
                self._report(content, jobDeploymentStatus="Running", jobStatus="RUNNING")
        elif state == "Running":
            self._follow(content)
        elif (
            state in ("Complete", "Failed")
            and content["spec"].get("shutdownAfterJobFinishes")
            and age_s(status["endTime"]) >= content["spec"].get("ttlSecondsAfterFinished", 0)
        ):
            self._pods(content).end()

    def _take_up(self, content: Json) -> None:
        if FINALIZER not in content["metadata"].get("finalizers", []):
            finalizers = [*content["metadata"].get("finalizers", []), FINALIZER]
            metadata = content["metadata"] | {"finalizers": finalizers}
            content = self._put("", content | {"metadata": metadata})
        self._report(
            content,
            jobDeploymentStatus="Initializing",
            jobId=content["spec"].get("jobId", content["metadata"]["name"]),
            rayClusterName=content["metadata"]["name"] + "-abcde",
            startTime=now(),
        )

    def _follow(self, content: Json) -> None:
        if self._pods(content).is_lost:
            return  # nobody answers at the head; KubeRay gives it five minutes
        exit_status = self._pods(content).exit_status
        if exit_status == 0:
            self._report(content, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", endTime=now())
        elif exit_status is not None:
            said = f"Job entrypoint command failed with exit code {exit_status}"
            end = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": said}
            self._report(content, **end, endTime=now())

    def _delete(self, content: Json) -> None:
        """KubeRay lets go of it at once; a foreground deletion waits for the pods, another one does not."""
        pods, finalizers = self._pods(content), content["metadata"]["finalizers"]
        self._end(pods)
        left = [of for of in finalizers if of == FOREGROUND and pods.are_there]
        if left != finalizers:
            self._put("", content | {"metadata": content["metadata"] | {"finalizers": left}})

    def _collect(self, uids: set[str]) -> None:
        """Ends the pods of RayJobs that are gone, as Kubernetes' garbage collector does."""
        for folder in self.pods_dir.glob("*"):
            if folder.name not in uids:
                self._end(Pods(folder))

    def _end(self, pods: Pods) -> None:
        told_at_s = self.told_to_end.setdefault(pods.folder.name, time.monotonic())
        if time.monotonic() - told_at_s >= self.behaviour.pods_linger_s:
            pods.end()

    def _pods(self, content: Json) -> Pods:
        return Pods(self.pods_dir / content["metadata"]["uid"])

    def _report(self, content: Json, **status: str) -> None:
        self._put("/status", content | {"status": content.get("status", {}) | status})

    def _put(self, subresource: str, content: Json) -> Json:
        path = f"{self.collection}/{content['metadata']['name']}{subresource}"
        answer: Json = self.http.put(path, json=content).raise_for_status().json()
        return answer


def why_invalid(content: Json) -> str | None:
    """Returns what KubeRay says of a RayJob that it does not take up, None of one that it does."""
    name, spec = content["metadata"]["name"], content["spec"]
    cluster = spec.get("rayClusterSpec")
    keeps_cluster = not spec.get("shutdownAfterJobFinishes")
    if len(name) > MAX_NAME:
        return f"RayJob name should be no more than {MAX_NAME} characters"
    if not DNS_1035.match(name):
        return "RayJob name should be a valid DNS1035 label"
    if spec.get("suspend") and keeps_cluster:
        return "a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and keeps_cluster:
        return "a RayJob with shutdownAfterJobFinishes set to false cannot have TTLSecondsAfterFinished"
    if cluster is None and not spec.get("clusterSelector"):
        return "one of RayClusterSpec or ClusterSelector must be set"
    if spec.get("backoffLimit", 0) < 0:
        return "backoffLimit must be a positive integer"
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        return "BackoffLimit is incompatible with InteractiveMode"
    for group in (cluster or {}).get("workerGroupSpecs", []):
        if not group["template"]["spec"]["containers"]:
            return "workerGroupSpec should have at least one container"
        if group["minReplicas"] > group["maxReplicas"]:
            return f"worker group {group['groupName']} has minReplicas greater than maxReplicas"
    if (cluster or {}).get("authOptions", {}).get("mode") == "token" and not cluster.get("rayVersion"):
        return "authOptions.mode is 'token' but RayVersion was not specified"
    return None


def now() -> str:
    return datetime.now(UTC).isoformat()


def age_s(text: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()


if __name__ == "__main__":
    address, secret, where, pods = sys.argv[1:5]
    given = Behaviour(**json.loads(sys.argv[5])) if len(sys.argv) > 5 else Behaviour()
    Operator(address, secret, where, Path(pods), given).run()

"""The chart's controller, run here as its pod would: its commands, its environment, its files below another root.

Then the chart's own test pod asks it, and what it tells Prometheus is compared with what alerts and dashboard ask for.
"""

import base64
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helm.test_monitoring import SERVICE_METRICS
from tests.support.chart import Object, containers, only, pod_templates, render, values_of
from tests.support.deadline import wait_until

NGD = str(Path(sys.executable).with_name("ngd"))
# Of these nothing is told before a job has run.
LATER = {"ngd_running_job_idle_seconds", "ngd_attempts_ended_total"}


class Pod:
    """A pod's containers as processes; /etc/ngd, /var/lib/ngd and /tmp lie in `root`."""

    def __init__(self, objects: list[Object], name: str, root: Path) -> None:
        self._pod = pod_templates(objects)[name]
        self._root = root
        secrets = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "Secret"}
        mounted = {mount["name"]: mount["mountPath"] for mount in containers(self._pod)[0]["volumeMounts"]}
        for volume in self._pod["spec"]["volumes"]:
            folder = self.path(mounted[volume["name"]])
            folder.mkdir(parents=True, exist_ok=True)
            for key, value in secrets.get(volume.get("secret", {}).get("secretName"), {}).items():
                (folder / key).write_bytes(base64.b64decode(value))

    def path(self, mount: str) -> Path:
        return self._root / mount.lstrip("/")

    def start(self, container: Object) -> subprocess.Popen[bytes]:
        """Starts a container's command; its output goes to `output`."""
        given = {one["name"]: self._moved(one["value"]) for one in container["env"]} | {"NGD_PORT": "0"}
        with self.output.open("wb") as output:
            return subprocess.Popen(
                [NGD, *container["args"]], env=os.environ | given, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> Path:
        return self._root / "output.txt"

    @property
    def url(self) -> str:
        line = next((line for line in self.output.read_text().splitlines() if "serves on" in line), "")
        return line.partition("serves on ")[2].partition(";")[0]

    def _moved(self, value: str) -> str:
        return str(self.path(value)) if value.startswith(("/etc/ngd/", "/var/lib/ngd", "/tmp")) else value


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(values_of("minimal"))


@pytest.fixture(scope="module")
def pod(objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    pod = Pod(objects, "Deployment/ngd-controller", tmp_path_factory.mktemp("pod"))
    migrate, serve = containers(only(objects, "Deployment")["spec"]["template"])
    assert pod.start(migrate).wait(timeout=60) == 0, pod.output.read_text()
    controller = pod.start(serve)
    wait_until(lambda: pod.url or controller.poll() is not None, "the controller is up", timeout_s=60)
    assert pod.url, pod.output.read_text()
    yield pod
    controller.terminate()
    controller.wait(timeout=20)


def test_probes_are_answered(objects: list[Object], pod: Pod) -> None:
    serve = containers(only(objects, "Deployment")["spec"]["template"])[-1]

    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        with urllib.request.urlopen(pod.url + serve[probe]["httpGet"]["path"], timeout=10) as reply:
            assert reply.status == 200


def test_generated_key_opens_the_api_and_none_does_not(pod: Pod) -> None:
    key = (pod.path("/etc/ngd/api-keys") / "first").read_text()
    asked = urllib.request.Request(pod.url + "/api/v1/jobs", headers={"Authorization": f"Bearer {key}"})

    with urllib.request.urlopen(asked, timeout=10) as reply:
        assert reply.status == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(pod.url + "/api/v1/jobs", timeout=10)


def test_pod_of_helm_test_is_content(objects: list[Object], pod: Pod) -> None:
    program = only(objects, "Pod")["spec"]["containers"][0]["args"][0]
    assert "http://ngd-controller.ngd.svc:8000" in program

    done = subprocess.run(
        [sys.executable, "-c", program.replace("http://ngd-controller.ngd.svc:8000", pod.url)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "a stranger is refused" in done.stdout


def test_alerts_and_dashboard_ask_for_what_the_service_tells(pod: Pod) -> None:
    with urllib.request.urlopen(pod.url + "/metrics", timeout=10) as reply:
        told = {line.partition("{")[0].partition(" ")[0] for line in reply.read().decode().splitlines()}

    assert SERVICE_METRICS - LATER - told == set()

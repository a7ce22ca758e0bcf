"""A job on the RayJob template that the chart makes, from its post through a strict API server to its end."""

from pathlib import Path

import pytest

from tests.fakes.kube.cluster import KubeCluster
from tests.support.attempts import small_spec
from tests.support.chart import only, render, values_of
from tests.support.service_process import ServiceProcess


def test_job_runs_to_its_end_on_the_charts_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = KubeCluster(tmp_path / "kubernetes").start()
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    template = only(render(values_of("kuberay-gpu-rdma")), "ConfigMap", "-rayjob")["data"]["rayjob.yaml"]
    cluster.template.write_text(template)
    service = ServiceProcess(tmp_path / "home", **cluster.settings)
    try:
        job = service.client.submit(small_spec().model_dump(mode="json"))

        ended = service.client.wait(job.id, timeout_s=90)

        assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1), ended.status
        assert list(cluster.times_created().values()) == [1]
    finally:
        service.close()
        cluster.stop()

"""What keeps a service from using KubeRay is said in one sentence before anything is created."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ngd_service.dispatchers import rayjob_api
from ngd_service.dispatchers.rayjob_api import connect
from ngd_service.errors import StartupError
from ngd_service.settings import load_settings
from tests.fakes.kube.cluster import NAMESPACE, TEMPLATE, KubeCluster
from tests.service.test_startup import assert_refused, serve


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "rayjob.yaml"
    file.write_text(yaml.safe_dump(TEMPLATE))
    return file


def test_kuberay_needs_a_template() -> None:
    with pytest.raises(StartupError, match=r"kuberay needs rayjob_template \(NGD_RAYJOB_TEMPLATE\)"):
        load_settings(dispatcher="kuberay")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rayjob_template", "/etc/ngd/rayjob/rayjob.yaml"),
        ("kubernetes_url", "http://127.0.0.1:8001"),
        ("kubernetes_namespace", "training"),
    ],
)
def test_setting_of_a_dispatcher_that_was_not_chosen_is_refused(name: str, value: str) -> None:
    with pytest.raises(
        StartupError, match=rf"{name} \(NGD_{name.upper()}\) is for the dispatcher kuberay, got .*local"
    ):
        load_settings(**{name: value})


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [("NGD_KUBERNETES_NAMESPACE", "My_Team", "My_Team"), ("NGD_KUBERNETES_URL", "localhost:8001", "localhost:8001")],
)
def test_name_that_kubernetes_can_not_have_ends_the_command(
    tmp_path: Path, template: Path, variable: str, value: str, word: str
) -> None:
    given = {"NGD_DISPATCHER": "kuberay", "NGD_RAYJOB_TEMPLATE": str(template), variable: value}

    assert_refused(serve(tmp_path / "home", **given), variable, word)
    assert not (tmp_path / "home").exists()


def test_template_that_can_not_be_used_ends_the_command(
    tmp_path: Path, template: Path, kube_cluster: KubeCluster
) -> None:
    content = copy.deepcopy(TEMPLATE)
    content["spec"]["backoffLimit"] = 3
    template.write_text(yaml.safe_dump(content))

    result = serve(tmp_path / "home", NGD_DISPATCHER="kuberay", NGD_RAYJOB_TEMPLATE=str(template))

    assert_refused(result, "NGD_RAYJOB_TEMPLATE", "spec.backoffLimit must not be 3", "leave it out")
    assert not (tmp_path / "home").exists()


def test_kubeconfig_gives_address_credentials_and_namespace(kube_cluster: KubeCluster) -> None:
    assert connect("", "").namespace == NAMESPACE
    assert connect("", "other").namespace == "other"
    assert connect("", "").get("none") is None  # it was let in


def test_given_address_is_asked_without_credentials(kube_cluster: KubeCluster) -> None:
    api = connect(kube_cluster.url + "/", "")

    assert api.namespace == "default"
    with pytest.raises(
        rayjob_api.BackendUnavailableError, match=r"\(401\): Unauthorized; .* check its service account"
    ):
        api.get("none")


def test_pod_uses_its_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("token", "secret"), ("ca.crt", "certificate"), ("namespace", "ours\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(rayjob_api, "OWN_NAMESPACE", tmp_path / "namespace")
    monkeypatch.setattr("kubernetes.client.ApiClient", lambda configuration: configuration)  # reads the certificate
    monkeypatch.setattr(rayjob_api, "RayJobApi", lambda configuration, namespace: (configuration, namespace))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")

    configuration, namespace = connect("", "")

    assert (configuration.host, namespace) == ("https://10.0.0.1:443", "ours")
    assert configuration.auth_settings()["BearerToken"]["value"] == "bearer secret"


def test_no_way_to_kubernetes_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere/config")

    with pytest.raises(StartupError, match=r"no pod with a service account.*; set NGD_KUBERNETES_URL or KUBECONFIG"):
        connect("", "")


def test_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes.client", None)

    with pytest.raises(StartupError, match=r"needs the extra kuberay.*pip install 'ngd-service\[kuberay\]'"):
        connect("", "")


def test_service_starts_without_the_extra_where_it_is_not_asked_for() -> None:
    code = (
        "import sys, ngd_service.app; print([name for name in ('kubernetes', 'ray', 'torch') if name in sys.modules])"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout == "[]\n"

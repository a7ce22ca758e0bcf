"""deploy/compose: its schema, and that it fits the images, the settings and its README. Docker itself is not asked."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import ngd_dist
from ngd_service.settings import ClientSettings, settings_class
from tests.support import ROOT

FOLDER = ROOT / "deploy" / "compose"
FILES = sorted(FOLDER.glob("compose*.yaml"))
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::?([-?])([^}]*))?\}")
OURS = ("ngd-service", "ngd-worker")


def interpolated(node: Any) -> Any:
    """Returns the file as Compose reads it in an empty environment."""
    if isinstance(node, dict):
        return {key: interpolated(value) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(value) for value in node]
    return VARIABLE.sub(lambda match: match[3], node).replace("$$", "$") if isinstance(node, str) else node


COMPOSE = interpolated(yaml.safe_load((FOLDER / "compose.yaml").read_text()))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

every_service = pytest.mark.parametrize("name", SERVICES)


def is_ours(service: dict[str, Any]) -> bool:
    return str(service["image"]).startswith(OURS)


def mounted_secrets(service: dict[str, Any]) -> dict[str, str]:
    """Returns path in the container -> secret."""
    given = service.get("secrets", [])
    pairs = ((s, f"/run/secrets/{s}") if isinstance(s, str) else (s["source"], s["target"]) for s in given)
    return {path: secret for secret, path in pairs}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_follows_the_schema(path: Path) -> None:
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stdout


@every_service
def test_images_have_a_full_tag(name: str) -> None:
    tag = str(SERVICES[name]["image"]).rpartition(":")[2]

    assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-\w+)?", tag), tag


def test_our_images_have_the_version_of_the_project() -> None:
    version = ngd_dist.__version__

    assert {service["image"] for service in SERVICES.values() if is_ours(service)} == {
        f"ngd-service:{version}",
        f"ngd-worker:{version}-cpu",
    }


def test_settings_are_settings_of_the_service() -> None:
    known = {f"NGD_{name.upper()}" for name in (*settings_class().model_fields, *ClientSettings.model_fields)}
    controller = SERVICES["controller"]
    exported = re.findall(r"^export (\w+)$", controller["command"][0], re.MULTILINE)

    assert exported == ["NGD_DATABASE_URL"]
    assert {name for name in controller["environment"] if name.startswith("NGD_")} <= known


def test_controller_and_ray_agree() -> None:
    controller, head, worker = (SERVICES[name] for name in ("controller", "ray-head", "ray-worker"))
    settings = controller["environment"]

    assert (settings["NGD_DISPATCHER"], settings["NGD_RAY_ADDRESS"]) == ("ray_jobs", "http://ray-head:8265")
    assert "--dashboard-host=0.0.0.0" in head["command"]
    assert "--port=6379" in head["command"]
    assert "--address=ray-head:6379" in worker["command"]
    assert settings["NGD_WORKER_URL"] == "http://controller:8000"
    for node in (head, worker):
        assert node["environment"]["RAY_AUTH_MODE"] == "token"
        assert mounted_secrets(node)[node["environment"]["RAY_AUTH_TOKEN_PATH"]] == "ray-token"
        assert node["environment"]["NGD_DATA_DIR"] == settings["NGD_DATA_DIR"]
        assert set(node["networks"]) & set(controller["networks"])
    runs = [
        mount["target"]
        for node in (controller, head, worker)
        for mount in node["volumes"]
        if mount.get("source") == "runs"
    ]
    assert runs == [settings["NGD_RUNS_DIR"]] * 3


def test_secrets_are_files_that_the_script_makes(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "secrets.sh", tmp_path)
    subprocess.run([tmp_path / "secrets.sh"], check=True, stdout=subprocess.DEVNULL)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    subprocess.run([tmp_path / "secrets.sh"], check=True, stdout=subprocess.DEVNULL)

    assert {f"secrets/{name}" for name in made} == {secret["file"] for secret in COMPOSE["secrets"].values()}
    assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in made.values())
    assert len(set(made.values())) == len(made)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made  # a second run keeps them
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert all(os.stat(tmp_path / "secrets" / name).st_mode & 0o004 for name in made)  # for uid 10001


def test_paths_of_secrets_are_those_that_are_read() -> None:
    for service in SERVICES.values():
        named = {
            value
            for name, value in service.get("environment", {}).items()
            if name.endswith(("_FILE", "_TOKEN_PATH")) and isinstance(value, str)
        }
        assert named <= mounted_secrets(service).keys()
    keys = SERVICES["controller"]["environment"]["NGD_API_KEYS_DIR"]
    assert [path for path in mounted_secrets(SERVICES["controller"]) if path.startswith(f"{keys}/")] == [
        f"{keys}/admin"
    ]


def test_no_secret_is_written_down() -> None:
    names = re.compile(r"(PASSWORD|SECRET|TOKEN|_KEY)$")

    assert [
        name for service in SERVICES.values() for name in service.get("environment", {}) if names.search(name)
    ] == []


@every_service
def test_health_is_known(name: str) -> None:
    """Our images bring their own question; replicas wait for what they need to be healthy."""
    service = SERVICES[name]

    assert is_ours(service) or service["healthcheck"]["test"][0] == "CMD"


@every_service
def test_gains_no_privileges(name: str) -> None:
    service = SERVICES[name]

    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name != "database":
        assert service["read_only"] is True
        assert "cap_add" not in service


@every_service
def test_is_reached_from_this_machine_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@every_service
def test_mounted_files_exist(name: str) -> None:
    sources = [
        m["source"] for m in SERVICES[name].get("volumes", []) if m["type"] == "bind" and m["source"] != "./data"
    ]
    if sources and not (ROOT / "deploy" / "monitoring").is_dir():
        pytest.skip("deploy/monitoring is not here, so nothing that Prometheus and Grafana mount is looked for")

    assert [source for source in sources if not (FOLDER / source).exists()] == []


def test_volumes_networks_and_secrets_are_declared() -> None:
    used: dict[str, set[str]] = {"volumes": set(), "networks": set(), "secrets": set()}
    for service in SERVICES.values():
        volumes = service.get("volumes", [])
        used["volumes"] |= {mount["source"] for mount in volumes if mount["type"] == "volume" and "source" in mount}
        used["networks"] |= set(service["networks"])
        used["secrets"] |= set(mounted_secrets(service).values())

    assert {kind: set(COMPOSE[kind]) for kind in used} == used


def test_readme_lists_every_variable() -> None:
    texts = [path.read_text() for path in FILES]
    variables = {match[1]: match for text in texts for match in VARIABLE.finditer(text)}
    readme = (FOLDER / "README.md").read_text()

    assert all(match[2] == "-" for match in variables.values())  # each has a default
    assert {name for name in variables if f"`{name}`" not in readme} == set()


def test_readme_names_files_that_exist() -> None:
    readme = (FOLDER / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if not link.startswith("http")]

    missing = [link for link in links if not (FOLDER / link).exists()]
    assert missing == [] or not (ROOT / "deploy" / "monitoring").is_dir()

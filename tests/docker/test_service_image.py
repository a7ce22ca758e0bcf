"""The service's image, truly built and started: as uid 10001, as PID 1, on a read-only root, with no daemon."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import ngd_dist
from tests.support.deadline import wait_until
from tests.support.images import ROOT, ImageStore, Sandbox, first_process, why_no_image_can_be_built
from tests.support.ranks import free_port

WHY_NOT = why_no_image_can_be_built()
BASE = "localhost/debian-python:bookworm"
IMAGE = "localhost/ngd-service:0.0.1"
SBOM = "usr/share/doc/ngd/sbom.cdx.json"
START_S = 60.0
MAX_BYTES = 400 * 2**20  # measured: 295 MiB, of which 126 are the Kubernetes client; torch alone would be above 1 GiB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
]


@dataclass(frozen=True, slots=True)
class Built:
    root: Path
    config: dict[str, Any]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    store = ImageStore(tmp_path_factory.mktemp("images"))
    try:
        store.add_base(BASE)
        store.build("service", VERSION="0.0.1", BASE_IMAGE=BASE)
        yield Built(store.unpack(IMAGE), store.inspect(IMAGE))
    finally:
        store.remove()


@pytest.fixture
def sandbox(image: Built, tmp_path: Path) -> Sandbox:
    state = tmp_path / "state"
    state.mkdir()
    return Sandbox(image.root, image.config, state)


def test_configuration_is_what_the_chart_relies_on(image: Built) -> None:
    assert image.config["User"] == "10001:10001"
    assert (image.config["Entrypoint"], image.config["Cmd"]) == (["ngd"], ["serve"])
    assert image.config["Healthcheck"]["Test"][:2] == ["CMD", "python3"]
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.0.1"
    assert labels["org.opencontainers.image.base.name"] == BASE
    assert re.fullmatch(r"[0-9a-f]{40}(-modified)?", labels["org.opencontainers.image.revision"])


def test_serves_on_a_read_only_root_and_ends_in_order(image: Built, sandbox: Sandbox) -> None:
    port = str(free_port())
    command = [*image.config["Entrypoint"], *image.config["Cmd"]]
    with sandbox.popen(command, {"NGD_PORT": port}) as process:
        try:
            assert process.stdout is not None
            assert f"serves on http://127.0.0.1:{port}" in process.stdout.readline()
            health = image.config["Healthcheck"]["Test"][1:]
            wait_until(lambda: sandbox.run(*health, NGD_PORT=port)[0] == 0, "it is healthy", timeout_s=START_S)

            assert httpx.get(f"http://127.0.0.1:{port}/healthz").json()["status"] == "ok"
            assert httpx.get(f"http://127.0.0.1:{port}/api/v1/jobs").json()["jobs"] == []
            dashboard = httpx.get(f"http://127.0.0.1:{port}/", follow_redirects=True)
            assert "ngd" in dashboard.text
            assert dashboard.status_code == 200

            os.kill(first_process(process), signal.SIGTERM)
            assert process.wait(timeout=30) == 0, process.stdout.read()
        finally:
            process.kill()


def test_is_unhealthy_when_nothing_answers(image: Built, sandbox: Sandbox) -> None:
    status, output = sandbox.run(*image.config["Healthcheck"]["Test"][1:], NGD_PORT=str(free_port()))

    assert status == 1
    assert "nothing healthy answers on port" in output


def test_command_line_works_without_a_writable_root(sandbox: Sandbox) -> None:
    status, output = sandbox.run("ngd", "--version")

    assert (status, output.strip()) == (0, f"ngd {project_version()}")
    assert sandbox.run("sh", "-c", "touch /opt/ngd/x")[0] != 0
    assert sandbox.run("sh", "-c", "touch /tmp/x /var/lib/ngd/x")[0] == 0


def test_has_neither_torch_nor_ray(sandbox: Sandbox) -> None:
    code = "import importlib.util as i; print([n for n in ('torch', 'ray', 'numpy') if i.find_spec(n)])"

    assert sandbox.run("python", "-c", code) == (0, "[]\n")


def test_root_owns_everything_but_the_writable_folders(image: Built) -> None:
    user = image.config["User"].partition(":")[0]
    found = subprocess.run(
        ["find", image.root, "(", "-type", "f", "-o", "-type", "d", ")", "(", "-uid", user, "-o", "-perm", "-002", ")",
         "-printf", "/%P\n"],
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip

    assert set(found.stdout.split()) <= {"/tmp", "/var/tmp", "/run/lock", "/var/lib/ngd", "/var/lib/ngd/runs"}


def test_no_program_runs_as_another_user(image: Built) -> None:
    found = subprocess.run(
        ["find", image.root, "-type", "f", "-perm", "/6000"], capture_output=True, text=True, check=True
    )

    assert found.stdout == ""


def test_leaves_no_settings_of_the_package_index_behind(image: Built) -> None:
    assert not (image.root / "run/secrets/package-index").exists()
    assert not (image.root / "opt/tools").exists()
    assert not any(name.startswith(("PIP_", "UV_")) for name in image.config["Env"])


def test_bill_of_materials_is_what_the_lock_file_pins(image: Built) -> None:
    materials = json.loads((image.root / SBOM).read_text())
    listed = {normal(part["name"]): part["version"] for part in materials["components"]}

    assert materials["bomFormat"] == "CycloneDX"
    assert materials["metadata"]["component"]["name"] == "ngd-service"
    assert not listed.keys() & {"torch", "ray", "triton", "numpy"}
    beside_it = dict.fromkeys(("ngd-dist", "ngd-workers"), project_version())
    assert listed == locked("service-image") | beside_it


def test_bytecode_does_not_depend_on_when_it_was_made(image: Built) -> None:
    """Its flags say that it goes by no time and no hash of the source: two builds are then the same."""
    flags = {path.read_bytes()[4:8] for path in (image.root / "opt/ngd").rglob("*.pyc")}

    assert flags == {(1).to_bytes(4, "little")}


def test_environment_is_small(image: Built) -> None:
    size = sum(path.lstat().st_size for path in (image.root / "opt/ngd").rglob("*") if not path.is_symlink())

    assert size < MAX_BYTES


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def project_version() -> str:
    return ngd_dist.__version__


def locked(group: str) -> dict[str, str]:
    """Returns name -> version of what uv.lock pins for a group on this platform, as the builder reads it."""
    from packaging.requirements import Requirement

    exported = subprocess.run(
        [Path(sys.executable).with_name("uv"), "export", "--quiet", "--frozen", "--only-group", group,
         "--no-emit-workspace", "--no-header", "--no-annotate", "--no-hashes"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = [Requirement(line) for line in exported.stdout.splitlines() if line.strip()]
    return {
        normal(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in wanted
        if requirement.marker is None or requirement.marker.evaluate()
    }

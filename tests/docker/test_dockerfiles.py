"""What the Dockerfiles promise, held by reading them and by the linters that are here. Nothing is built."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT

DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
SCRIPTS = sorted(DOCKER.glob("*.sh"))
UV = str(Path(sys.executable).with_name("uv"))
HADOLINT = Path(sys.executable).with_name("hadolint")
CHECKOV = ROOT / ".tools" / "checkov" / "bin" / "checkov"
# What docker/ may name of the world outside; a mirror of one's own is given from outside.
PUBLIC_HOSTS = {"download.pytorch.org"}
LABELS = {"title", "description", "licenses", "version", "revision", "created", "source", "base.name"}
GROUPS = {
    "service.Dockerfile": ("dependencies", "service-image"),
    "worker.Dockerfile": ('"dependencies-${VARIANT}"', "worker-image"),
}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Returns (instruction, its words) with continued lines joined."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def last(path: Path, name: str) -> str:
    """Returns what the final image has: the last such instruction."""
    return [words for instruction, words in instructions(path) if instruction == name][-1]


def final_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    return found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]


def export(group: str, *options: str) -> dict[str, str]:
    """Returns name -> version of what uv.lock pins for a dependency group, for every platform."""
    command = [UV, "export", "--quiet", "--frozen", "--only-group", group, "--no-emit-workspace", "--no-header"]
    command += ["--no-annotate", "--no-hashes", *options]
    exported = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^ ;\n]+)", exported.stdout, re.MULTILINE))


def test_there_are_the_two_images_of_the_chart() -> None:
    assert {path.name for path in FILES} == set(GROUPS)


@every_file
def test_hadolint_finds_nothing(path: Path) -> None:
    linted = subprocess.run([HADOLINT, path], capture_output=True, text=True, check=False)

    assert (linted.returncode, linted.stdout) == (0, "")


@every_file
def test_what_is_ignored_has_a_reason(path: Path) -> None:
    lines = path.read_text().splitlines()
    ignoring = [i for i, line in enumerate(lines) if "hadolint ignore" in line or "checkov:skip" in line]

    assert all(lines[i - 1].startswith("# ") for i in ignoring)


@every_file
def test_checkov_finds_nothing(path: Path) -> None:
    if not CHECKOV.exists():
        pytest.skip("no checkov, so no policy scan of the Dockerfiles: make cluster-tools")
    command = [CHECKOV, "--framework", "dockerfile", "--file", path, "--compact", "--quiet", "--skip-download"]
    scanned = subprocess.run(command, capture_output=True, text=True, check=False)

    assert scanned.returncode == 0, scanned.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck, so the scripts of docker/ are checked by bash -n alone: make image-tools")
    subprocess.run(["shellcheck", path], check=True)


@every_file
def test_every_stage_is_on_one_base_that_can_be_pinned(path: Path) -> None:
    found = instructions(path)
    default = next(words for name, words in found if name == "ARG" and words.startswith("BASE_IMAGE="))

    assert found[0] == ("ARG", default)
    assert {words.split()[0] for name, words in found if name == "FROM"} == {"${BASE_IMAGE}"}
    assert re.fullmatch(r"BASE_IMAGE=[\w.]+/[\w/]+:3\.11\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", default)


def test_images_share_their_base() -> None:
    assert len({instructions(path)[0] for path in FILES}) == 1


@every_file
def test_runs_as_a_numeric_user_that_is_not_root(path: Path) -> None:
    assert last(path, "USER") == "10001:10001"
    assert all(words == "10001:10001" for name, words in instructions(path) if name == "USER")


def test_commands_are_those_that_the_chart_relies_on() -> None:
    service, worker = DOCKER / "service.Dockerfile", DOCKER / "worker.Dockerfile"

    assert [last(service, name) for name in ("ENTRYPOINT", "CMD", "EXPOSE")] == ['["ngd"]', '["serve"]', "8000"]
    assert last(worker, "CMD") == '["bash"]'
    assert "ENTRYPOINT" not in {name for name, _ in instructions(worker)}


@every_file
def test_health_is_asked_without_a_shell(path: Path) -> None:
    command = last(path, "HEALTHCHECK")

    assert re.search(r'CMD \["python3", "/usr/local/lib/ngd/healthcheck.py", "(service|ray)"\]$', command)
    assert path.name.startswith("service") == ('"service"' in command)


@every_file
def test_labels_are_open_container_labels(path: Path) -> None:
    labels = last(path, "LABEL")

    assert set(re.findall(r"org\.opencontainers\.image\.([\w.]+)=", labels)) == LABELS
    arguments = {words.partition("=")[0] for name, words in final_stage(path) if name == "ARG"}
    assert set(re.findall(r"\$\{(\w+)\}", labels)) <= arguments


@every_file
def test_nothing_floats(path: Path) -> None:
    assert "latest" not in path.read_text()


@every_file
def test_final_stage_has_no_build_tools(path: Path) -> None:
    commands = " ".join(words for name, words in final_stage(path) if name == "RUN")

    assert not re.search(r"\b(pip|uv|gcc|g\+\+|build-essential|git|curl|wget|environment\.sh)\b", commands)
    assert {words.split()[1] for name, words in final_stage(path) if name == "COPY" and "--from=builder" in words} == {
        "/opt/ngd",
        "/opt/sbom.cdx.json",
    }


@every_file
def test_extras_are_those_of_the_chart(path: Path) -> None:
    commands = [words for name, words in instructions(path) if name == "RUN"]
    command, wanted = GROUPS[path.name]

    assert any(words.endswith(f"docker/environment.sh {command} {wanted}") for words in commands)


def test_service_has_neither_torch_nor_ray() -> None:
    names = export(GROUPS["service.Dockerfile"][1])

    assert {"fastapi", "psycopg", "kubernetes", "nicegui"} <= names.keys()
    assert not names.keys() & {"torch", "torchvision", "ray", "triton", "numpy"}


def test_worker_has_the_ray_of_the_lock_file() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    ray = [package["version"] for package in lock if package["name"] == "ray"]

    assert [export(GROUPS["worker.Dockerfile"][1])["ray"]] == ray


def test_cpu_variant_brings_nothing_of_cuda() -> None:
    """What environment.sh prunes: the rest of CUDA hangs on torch alone."""
    script = (DOCKER / "environment.sh").read_text()
    pruned = re.findall(r"--prune (\w+)", script)
    names = export(GROUPS["worker.Dockerfile"][1], *(word for name in pruned for word in ("--prune", name)))

    assert pruned == ["torch", "torchvision"]
    assert "ray" in names
    assert [name for name in names if name.startswith(("nvidia-", "cuda-", "torch", "triton"))] == []


def test_builder_is_pinned_by_hash() -> None:
    pinned = (DOCKER / "build.txt").read_text()
    wanted = [line for line in (DOCKER / "build.in").read_text().splitlines() if line and not line.startswith("#")]
    requirements = re.split(r"\n(?=[a-z])", pinned.partition("\n\n")[2] or pinned)

    assert all(re.search(rf"^{name}==", pinned, re.MULTILINE) for name in wanted)
    assert all("--hash=sha256:" in requirement for requirement in requirements if not requirement.startswith("#"))


def test_context_holds_what_is_copied_and_nothing_else() -> None:
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = {
        source
        for path in FILES
        for name, words in instructions(path)
        if name == "COPY" and "--from" not in words
        for source in words.split()[:-1]
        if not source.startswith(("workers/", "service/"))  # a part of what is copied whole
    }

    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    assert set(allowed) == copied


def test_no_address_but_public_ones_is_written_down() -> None:
    texts = [path.read_text() for path in DOCKER.iterdir() if path.suffix != ".md" and path.is_file()]

    assert {host for text in texts for host in re.findall(r"https?://([\w.-]+)", text)} == PUBLIC_HOSTS

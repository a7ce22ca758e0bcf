"""Packages that a job's code asks for and this machine lacks, installed by uv into a folder that later jobs use again.

What is installed here stays as it is: a requirement that contradicts it is refused. Imports without torch.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from ngd_workers.contract.errors import SpecError, StorageError

__all__ = ["installed"]

PLANNED = " + "  # name==version, or name @ address
HEAD = re.compile(r"^(error|cause): ")
REASON_CHARACTERS = 600


def installed(requirements: Path) -> Path:
    """Returns the folder with the packages that the file asks for, without those that are installed on this machine.

    One process of a machine installs, and the others wait for it. Raises: SpecError with uv's reason, StorageError.
    """
    uv = _uv()
    here = _installed_here()
    try:
        text = requirements.read_bytes()
    except OSError as error:
        raise SpecError(f"can't read code.requirements {requirements.name}: {error.strerror}") from error
    key = hashlib.sha256(b"\0".join([text, sys.version.encode(), here.encode()])).hexdigest()
    cache = Path.home() / ".cache" / "ngd" / "requirements"
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (cache / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _install(uv, requirements, here, folder)
    except OSError as error:
        raise StorageError(f"can't install code.requirements into {folder}: {error.strerror or error}") from error
    return folder


def _uv() -> str:
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError) as error:
        raise SpecError(
            'code.requirements needs uv where the workers run: pip install "ngd-workers[train]" brings it; or build an '
            "image that has the packages, and leave code.requirements out"
        ) from error


def _installed_here() -> str:
    """Returns the packages of this machine as requirements that nothing else satisfies."""
    versions: dict[str, str] = {}
    for package in distributions():
        if package.name and package.version:
            versions.setdefault(package.name, package.version)  # the first on the path is the one that is imported
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def _install(uv: str, requirements: Path, here: str, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        constraints = temporary / "installed.txt"
        constraints.write_text(here)
        # A plan for this Python's own environment names what it lacks, and takes a local build of torch for what it is.
        plan = _run(
            [uv, "pip", "install", "--dry-run", "--break-system-packages"],
            requirements,
            *("--requirements", str(requirements), "--constraints", str(constraints)),
        )
        packages = [line.removeprefix(PLANNED) for line in plan.splitlines() if line.startswith(PLANNED)]
        target = temporary / "packages"
        target.mkdir()
        if packages:
            _run([uv, "pip", "install", "--no-deps"], requirements, "--target", str(target), *packages)
        os.replace(target, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run(command: list[str], requirements: Path, *given: str) -> str:
    """Returns uv's output; it reads its settings (an index) in the folder of the requirements. Raises: SpecError."""
    command = [*command, *given, "--python", sys.executable, "--color", "never", "--no-progress"]
    ended = subprocess.run(
        command,
        cwd=requirements.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if ended.returncode:
        raise SpecError(
            f"can't install the packages of code.requirements {requirements.name}: {_reason(ended.stdout)}; what the "
            "workers have installed stays as it is"
        )
    return ended.stdout


def _reason(output: str) -> str:
    """Returns uv's words from its error on, in one line."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    begin = next((index for index, line in enumerate(lines) if HEAD.match(line)), 0)
    words = " ".join(HEAD.sub("", line) for line in lines[begin:] if line)
    return words[:REASON_CHARACTERS].rstrip(".") or "uv gives no reason"

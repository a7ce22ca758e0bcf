"""Builds an image without a daemon or a registry, and runs what is in it on a file system that is truly read-only."""

import json
import os
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support import ROOT

NEEDED = ("buildah", "debootstrap", "unshare", "setpriv")
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
WRITABLE = "/var/lib/ngd"


def why_no_image_can_be_built() -> str | None:
    """Returns a sentence for pytest.skip; None: all that is needed is here."""
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        return f"no image is built, for want of {', '.join(missing)}: make image-tools, as root on Debian"
    if os.geteuid() != 0:
        return "no image is built: debootstrap and buildah's chroot isolation need root"
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    mounted = subprocess.run(command, capture_output=True, check=False)
    return None if mounted.returncode == 0 else "no image is built: this machine does not let root mount"


class ImageStore:
    """Images and containers of buildah in a folder of their own. Containers are folders: nothing runs in them here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        storage = ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]
        self._buildah = ["buildah", *storage]

    def buildah(self, *arguments: str) -> str:
        done = subprocess.run([*self._buildah, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def add_base(self, name: str) -> None:
        """Makes an image of Debian with Python, as stands in the Dockerfiles' place of python:slim."""
        root = self._folder / "base"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", root],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, str(root), "/")
        self.buildah("commit", "--quiet", container, name)
        self.buildah("rm", container)
        shutil.rmtree(root)

    def build(self, *images: str, **environment: str) -> None:
        """Runs docker/build.sh with this machine's settings of the package index."""
        options = ["--isolation", "chroot", *_index_options(self._folder)]
        given = {"BUILDER": shlex.join(self._buildah), "OPTIONS": " ".join(options)} | environment
        built = subprocess.run(
            [ROOT / "docker" / "build.sh", *images],
            env=os.environ | given,
            capture_output=True,
            text=True,
            check=False,
        )
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]

    def inspect(self, image: str) -> dict[str, Any]:
        """Returns the image's configuration: User, Env, Entrypoint, Cmd, Labels, Healthcheck ..."""
        return dict(json.loads(self.buildah("inspect", "--type", "image", image))["Docker"]["config"])

    def unpack(self, image: str) -> Path:
        """Returns the root folder of a container of the image."""
        return Path(self.buildah("mount", self.buildah("from", image)))

    def remove(self) -> None:
        subprocess.run([*self._buildah, "rm", "--all"], capture_output=True, check=False)
        subprocess.run([*self._buildah, "rmi", "--all", "--force"], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


class Sandbox:
    """Runs commands in an unpacked image as its configuration says: its user and environment, as PID 1.

    They gain no privileges, and the root file system is mounted read-only but for /tmp and /var/lib/ngd. The network
    is this machine's.
    """

    def __init__(self, root: Path, config: Mapping[str, Any], state: Path) -> None:
        """state: folder that is /var/lib/ngd in there."""
        self._root, self._config, self._state = root, config, state
        self._user = str(config["User"])
        uid, _, gid = self._user.partition(":")
        os.chown(state, int(uid), int(gid))

    def popen(self, command: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen[str]:
        """Starts it; it ends when the returned process does."""
        inside = dict(variable.split("=", 1) for variable in self._config["Env"]) | dict(environment)
        words = ["env", "--ignore-environment", *(f"{name}={value}" for name, value in inside.items())]
        # The shell changes to the working directory and is then replaced, so that the command is PID 1.
        words += ["sh", "-c", f'cd {shlex.quote(self._config["WorkingDir"])} && exec "$@"', "sh", *command]
        root = shlex.quote(str(self._root))
        script = f"""
            set -e
            mount --bind {root} {root}
            mount -o remount,bind,ro {root}
            mount -t proc proc {root}/proc
            mount --rbind /dev {root}/dev
            mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
            mount --bind {shlex.quote(str(self._state))} {root}{WRITABLE}
            exec setpriv --no-new-privs chroot --userspec={self._user} {root} {shlex.join(words)}
        """
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"]
        arguments = [*namespaces, "bash", "-c", textwrap.dedent(script)]
        return subprocess.Popen(arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

    def run(self, *command: str, timeout_s: float = 120, **environment: str) -> tuple[int, str]:
        """Returns its exit status and what it wrote."""
        process = self.popen(command, environment)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        return process.returncode, output


def first_process(sandboxed: subprocess.Popen[str]) -> int:
    """Returns the id, out here, of what is PID 1 in there."""
    children = Path(f"/proc/{sandboxed.pid}/task/{sandboxed.pid}/children").read_text().split()
    assert len(children) == 1, children
    return int(children[0])


def _index_options(folder: Path) -> list[str]:
    """Returns the options that hand this machine's package index to a build: variables, certificates, local folders."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
    certificates = next((os.environ[name] for name in CERTIFICATE_VARIABLES if os.environ.get(name)), None)
    settings = folder / "package-index"
    settings.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()))
    options = ["--secret", f"id=package-index,src={settings}"]
    if certificates:
        options += ["--secret", f"id=ca-certificates,src={certificates}"]
    folders = {word for value in variables.values() for word in value.split() if Path(word).is_absolute()}
    for path in sorted(path for path in folders if Path(path).is_dir()):
        options += ["--volume", f"{path}:{path}:ro"]
    return options

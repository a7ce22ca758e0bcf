"""The user's own code in a process of ours: its folder and its packages come last on the path, after all of ours.

So a module `torch` or a package `workers` of the user's breaks nothing, here or in the processes that read samples.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from ngd_workers.contract.errors import InvalidDataError, SpecError, StorageError, WorkerError
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import AttemptDir, Facts
from ngd_workers.contract.spec import AnySpec, Code
from ngd_workers.contract.spec.code import MAX_UNPACKED_BYTES
from ngd_workers.launch.requirements import installed

__all__ = ["entered", "unpack", "variables"]

BLOCK_BYTES = 1 << 20
READ_S = 30.0  # NFS may show a new file late
HIDDEN_CHARACTERS = 4  # a shorter secret would take letters out of every word


def unpack(attempt_dir: AttemptDir, spec: AnySpec, facts: Facts) -> None:
    """Makes the attempt's folder of code from the archive, in one step; once it is there, nothing happens.

    Raises: InvalidDataError, StorageError, with the archive's name.
    """
    if spec.code is None or facts.code is None or facts.code.is_dir() or attempt_dir.code.is_dir():
        return
    archive = facts.code
    temporary: Path | None = None
    try:
        insist(archive.stat, f"find the job's code {archive}", patience_s=READ_S)
        _check_sum(archive, spec.code)
        temporary = Path(tempfile.mkdtemp(prefix=".code-", dir=attempt_dir.path))
        _extract(archive, temporary)
        os.replace(temporary, attempt_dir.code)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InvalidDataError(f"{archive} is no archive of code that can be unpacked: {error}") from error
    except WorkerError:
        raise
    except OSError as error:
        raise StorageError(f"can't unpack {archive} into {attempt_dir.code}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def entered(attempt_dir: AttemptDir, spec: AnySpec, facts: Facts) -> Iterator[None]:
    """The present process, and those it starts, see the job's code, packages, variables and secrets until the end.

    Raises: SpecError, StorageError. An error from within passes without the secrets that its message quotes.
    """
    secrets = _secrets(spec.secrets, facts.secrets_dir)
    with contextlib.ExitStack() as until_the_end:
        until_the_end.enter_context(_unquoted(secrets.values()))
        until_the_end.enter_context(variables(spec.env | secrets))  # first: they may say where uv finds packages
        if spec.code is not None:
            folder = _folder(attempt_dir, facts)
            places = [folder]
            if spec.code.requirements is not None:
                places.append(installed(folder / spec.code.requirements))
            until_the_end.enter_context(_last_on_path(places))
            until_the_end.enter_context(contextlib.chdir(folder))
        yield


def _check_sum(archive: Path, code: Code) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != code.sha256:
        raise InvalidDataError(
            f"{archive} is damaged: its SHA-256 is {digest.hexdigest()}, and the job names {code.sha256}; delete it "
            "and submit the job again"
        )


def _extract(archive: Path, folder: Path) -> None:
    left = MAX_UNPACKED_BYTES
    with tarfile.open(archive, "r:gz") as files:
        for member in files:
            left -= member.size
            if left < 0:
                raise InvalidDataError(
                    f"{archive} holds more than {MAX_UNPACKED_BYTES >> 20} MiB once it is unpacked; ship less code"
                )
            files.extract(member, folder, filter="data")  # refuses what would lie outside of the folder


def _folder(attempt_dir: AttemptDir, facts: Facts) -> Path:
    folder = facts.code if facts.code is not None and facts.code.is_dir() else attempt_dir.code
    insist(folder.stat, f"find the job's code in {folder}", patience_s=READ_S)
    return folder


def _secrets(wanted: Mapping[str, str], folder: Path | None) -> dict[str, str]:
    """Returns variable -> secret. No message quotes one."""
    if not wanted:
        return {}
    if folder is None:
        raise SpecError(
            f"the job names the secrets {', '.join(sorted(set(wanted.values())))}, and there is no folder of them; set "
            "NGD_SECRETS_DIR, or --secrets-dir where there is no service"
        )
    return {variable: _secret(name, folder) for variable, name in wanted.items()}


def _secret(name: str, folder: Path) -> str:
    path = folder / name
    try:
        value = path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"there is no secret {name!r} where the workers run: can't read {path} ({error.strerror}); the operator "
            "puts a file of that name into NGD_SECRETS_DIR"
        ) from None
    try:
        text = value.decode().removesuffix("\n")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise SpecError(f"the secret {name!r} in {folder} is no UTF-8 text, so no variable can hold it")
    return text


@contextlib.contextmanager
def _unquoted(secrets: Collection[str]) -> Iterator[None]:
    """Takes the secrets out of the messages of errors: a library may quote a token, and messages become events."""
    shown = sorted((text for text in secrets if len(text) >= HIDDEN_CHARACTERS), key=len, reverse=True)
    try:
        yield
    except Exception as error:
        one: BaseException | None = error
        while shown and one is not None:
            one.args = tuple(_hide(part, shown) if isinstance(part, str) else part for part in one.args)
            one = one.__cause__ or one.__context__
        raise


def _hide(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables until the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _last_on_path(folders: list[Path]) -> Iterator[None]:
    added = [str(folder) for folder in folders]
    sys.path.extend(added)
    try:
        yield
    finally:
        for folder in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)

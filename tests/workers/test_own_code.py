"""A job's own code, variables and secrets: in real processes, and in the sentences of what goes wrong."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ngd_workers.contract.errors import InvalidDataError, SpecError, StorageError, UserCodeError
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.contract.spec import JobSpec
from ngd_workers.contract.spec_file import load_spec
from ngd_workers.contract.spec_problems import SpecProblemsError, parse_spec
from ngd_workers.functions import load_function
from ngd_workers.launch import own_code
from tests.support.attempts import make_attempt, small_spec
from tests.support.own_code import archive_of, users_folder, write

SECRET = "c0rrect-horse"
RUN_S = 200


@pytest.fixture
def secrets_dir(tmp_path: Path) -> Path:
    return write(tmp_path / "secrets", {"token": f"{SECRET}\n"})


def mine(folder: Path, sha256: str | None = None, **changes: object) -> JobSpec:
    """Returns the job of the folder, with a secret."""
    spec = load_spec(folder / "job.yaml").model_dump(mode="json")
    spec |= {"secrets": {"TOKEN": "token"}, "code": {"sha256": sha256}, **changes}
    job = parse_spec(spec)
    assert isinstance(job, JobSpec)
    return job


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=RUN_S, check=False
    )


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_training_alone_uses_the_folder_of_the_job(tmp_path: Path, secrets_dir: Path) -> None:
    folder = users_folder(tmp_path / "theirs")
    job = folder / "job.yaml"
    job.write_text(job.read_text() + "secrets: {TOKEN: token}\nloading: {processes: 1}\n")

    ended = run(
        *("ngd_workers", "job.yaml", "--run-dir", str(tmp_path / "run"), "--secrets-dir", str(secrets_dir)),
        folder=folder,
    )

    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / ".gitignore").read_text() == "*\n"
    assert f"in {folder} with plain and {len(SECRET)} characters" in ended.stdout
    assert files_with(SECRET, tmp_path / "run") == []


@pytest.mark.parametrize(
    "workers",
    # tests/end_to_end/test_own_code.py starts the driver of one worker by default
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=[pytest.mark.ray, pytest.mark.slow])],
    ids=["here", "on Ray"],
)
def test_driver_unpacks_the_archive_for_each_rank(tmp_path: Path, secrets_dir: Path, workers: int) -> None:
    folder = users_folder(tmp_path / "theirs")
    archive = tmp_path / "code.tar.gz"
    spec = mine(folder, archive_of(folder, archive), resources={"workers": workers}, loading={"processes": 1})
    attempt = make_attempt(tmp_path / "run", spec, code=archive, secrets_dir=secrets_dir)
    started_in = users_folder(tmp_path / "elsewhere")  # where the service was started; its torch.py hides nothing

    ended = run("ngd_workers.launch", str(attempt.path), folder=started_in)

    assert ended.returncode == 0, ended.stderr
    ranks = [attempt.rank_log(rank).read_text() for rank in range(workers)]
    assert all(f"in {attempt.code} with plain and {len(SECRET)} characters" in log for log in ranks)
    assert files_with(SECRET, tmp_path / "run") == []
    assert SECRET not in ended.stderr + ended.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "mine", {"a.py": "", "deep/b.py": "B = 2\n"})


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., AttemptDir]:
    """Makes an attempt whose code is the archive."""

    def make(sha256: str | None = None, archive: Path | None = None, **facts: object) -> AttemptDir:
        code = {"sha256": sha256} if archive is not None else None
        return make_attempt(tmp_path / "run", small_spec(code=code), code=archive, **facts)

    return make


def unpack(attempt: AttemptDir) -> None:
    own_code.unpack(attempt, attempt.read_spec(), attempt.read_facts())


def test_archive_is_unpacked_once(attempt: Callable[..., AttemptDir], folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar.gz"
    unpacked = attempt(archive_of(folder, archive), archive)
    unpack(unpacked)
    archive.unlink()

    unpack(unpacked)

    assert (unpacked.code / "deep" / "b.py").read_text() == "B = 2\n"
    assert [path.name for path in unpacked.path.iterdir() if path.name.startswith(".")] == []


def test_archive_that_is_not_there_is_named(
    attempt: Callable[..., AttemptDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_code, "READ_S", 0.1)

    with pytest.raises(StorageError, match=r"can't find the job's code .*x\.tar\.gz.* No such file"):
        unpack(attempt("0" * 64, tmp_path / "x.tar.gz"))


def test_archive_of_another_sum_is_named(attempt: Callable[..., AttemptDir], folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar.gz"
    archive_of(folder, archive)

    with pytest.raises(InvalidDataError, match=r"x\.tar\.gz is damaged: its SHA-256 is"):
        unpack(attempt("0" * 64, archive))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        (None, 0, r"x\.tar\.gz is no archive of code that can be unpacked"),
        ("../out.py", 0, r"'\.\./out\.py' would be extracted to .*, which is outside the destination"),
        ("big.bin", 2000, r"x\.tar\.gz holds more than 0 MiB once it is unpacked"),
    ],
    ids=["no archive", "leads out", "too large"],
)
def test_archive_that_can_not_be_unpacked_is_named(
    attempt: Callable[..., AttemptDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    size: int,
    words: str,
) -> None:
    monkeypatch.setattr(own_code, "MAX_UNPACKED_BYTES", 1000)
    archive = tmp_path / "x.tar.gz"
    if name is None:
        archive.write_bytes(b"words")
    else:
        with tarfile.open(archive, "w:gz") as files:
            member = tarfile.TarInfo(name)
            member.size = size
            files.addfile(member, io.BytesIO(bytes(size)))
    broken = attempt(hashlib.sha256(archive.read_bytes()).hexdigest(), archive)

    with pytest.raises(InvalidDataError, match=words):
        unpack(broken)

    assert not broken.code.exists()
    assert not list(tmp_path.rglob("out.py"))


def test_process_is_as_before_once_the_job_has_ended(
    attempt: Callable[..., AttemptDir], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEPT", "before")
    before = (list(sys.path), Path.cwd(), dict(os.environ))
    spec = small_spec(code={}, env={"KEPT": "within", "NEW": "1"})
    entered = make_attempt(folder.parent / "here", spec, code=folder)

    with own_code.entered(entered, spec, entered.read_facts()):
        assert (sys.path[-1], Path.cwd(), os.environ["KEPT"], os.environ["NEW"]) == (
            *(str(folder), folder),
            *("within", "1"),
        )

    assert (list(sys.path), Path.cwd(), dict(os.environ)) == before


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"there is no secret 'token' .* can't read .*secrets/token \(No such file"),
        (None, r"the job names the secrets token, and there is no folder of them; set NGD_SECRETS_DIR"),
        ({"token/deeper": ""}, r"can't read .*secrets/token \(Is a directory\)"),
        ({"token": "\0hush"}, r"the secret 'token' in .*secrets is no UTF-8 text"),
    ],
    ids=["missing", "no folder", "a folder", "bytes"],
)
def test_secret_that_is_not_there_is_named(tmp_path: Path, files: dict[str, str] | None, words: str) -> None:
    secrets_dir = None if files is None else write(tmp_path / "secrets", files)
    (tmp_path / "secrets").mkdir(exist_ok=True)
    spec = small_spec(secrets={"TOKEN": "token"})
    attempt = make_attempt(tmp_path / "run", spec, secrets_dir=secrets_dir)

    with pytest.raises(SpecError, match=words) as caught, own_code.entered(attempt, spec, attempt.read_facts()):
        pass
    assert "hush" not in str(caught.value)


def quotes_its_token() -> None:
    try:
        raise LookupError(f"no host for {os.environ['TOKEN']}")
    except LookupError as error:
        raise UserCodeError(f"can't open https://{os.environ['TOKEN']}@hub") from error


def test_error_that_quotes_a_secret_passes_without_it(tmp_path: Path, secrets_dir: Path) -> None:
    spec = small_spec(secrets={"TOKEN": "token"})
    attempt = make_attempt(tmp_path / "run", spec, secrets_dir=secrets_dir)
    within = own_code.entered(attempt, spec, attempt.read_facts())

    with pytest.raises(UserCodeError, match=r"^can't open https://\*\*\*@hub$") as caught, within:
        quotes_its_token()
    assert str(caught.value.__cause__) == "no host for ***"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": {"NGD_HOME": "x"}}, "env: NGD_HOME is set by the service, Ray, torch or Python themselves"),
        ({"env": {"PYTHONPATH": "x"}}, "PYTHONPATH is set by"),
        ({"env": {"RANK": "1"}}, "RANK is set by"),
        ({"secrets": {"LD_PRELOAD": "x"}}, "secrets: LD_PRELOAD is set by"),
        ({"env": {"1ST": "x"}}, "no digit first, got '1ST'"),
        ({"env": {"A": 1}}, "env.A must be a text, got 1"),
        ({"env": {"A": "x\0"}}, "the value of A must be a text"),
        ({"secrets": {"A": "../key"}}, "A must name a secret, .* got '../key'"),
        ({"secrets": {"A": ".hidden"}}, "not beginning with a dot"),
        ({"env": {"A": "x"}, "secrets": {"A": "y"}}, "env and secrets both set A, and one can count"),
        ({"code": {"requirements": "../r.txt"}}, "code.requirements: must be the path of a file inside"),
        ({"code": {"sha256": "abc"}}, "code.sha256 must match"),
        ({"image": "My Image"}, "image must match"),
        ({"image": "mine:"}, "image must match"),
        ({"code": {"exlude": []}}, "code has no field 'exlude'"),
    ],
)
def test_spec_refuses(changes: dict[str, object], words: str) -> None:
    spec = small_spec().model_dump(mode="json") | changes

    with pytest.raises(SpecProblemsError, match=words):
        parse_spec(spec)


def test_module_of_an_installed_package_in_the_place_of_ones_own_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path, {"httpx.py": "def make(): ...\n"}))

    with pytest.raises(UserCodeError, match=r"httpx/__init__\.py comes before your httpx\.py: give yours a name"):
        load_function("httpx:make")
    with pytest.raises(UserCodeError, match=r"ship the folder that holds it by `code: \{directory: \.\}`"):
        load_function("nowhere:make")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nopackage\n", r"No module named 'nopackage'; name its package in code\.requirements"),
        ("1 / 0\n", r"can't import 'failing_one' of 'failing_one:make': ZeroDivisionError: division by zero$"),
    ],
)
def test_module_that_can_not_be_imported_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.syspath_prepend(write(tmp_path, {"failing_one.py": text}))

    with pytest.raises(UserCodeError, match=words):
        load_function("failing_one:make")

"""What keeps the service from starting is said in one sentence with exit code 2, and nothing is created."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ngd_service.client.client import Client
from ngd_service.errors import StartupError
from ngd_service.home import owned
from ngd_service.settings import load_settings
from ngd_service.store.sql import SQLStore
from tests.support.attempts import small_spec
from tests.support.deadline import wait_until
from tests.support.keys import ALICE, write_keys
from tests.support.service_process import ServiceProcess

SPEC = small_spec(name="steps", schedule={"steps": 10_000}).model_dump(mode="json")


def serve(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ngd_service"],
        env=os.environ | {"NGD_HOME": str(home), "NGD_PORT": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::"])
def test_address_that_others_could_reach_is_refused_without_keys(host: str) -> None:
    with pytest.raises(StartupError, match=rf"must be a loopback address .* no API keys, got '{host}'.*KEYS_DIR"):
        load_settings(host=host)


@pytest.mark.parametrize("host", ["example.org", "", "127.0.0.1:80"])
def test_host_that_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(StartupError, match=rf"must be an IP address of this machine.*got '{host}'"):
        load_settings(host=host)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("10.1.2.3", "http://10.1.2.3:8000"),
        ("fd00::1", "http://[fd00::1]:8000"),
    ],
)
def test_with_keys_any_address_is_taken(tmp_path: Path, host: str, url: str) -> None:
    settings = load_settings(host=host, api_keys_dir=tmp_path)

    assert (settings.url, settings.people_url, settings.is_loopback) == (url, url, False)


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://NGD.example.com", "https://ngd.example.com"),
        ("https://ngd.example.com:443/", "https://ngd.example.com"),
        ("http://[fd00::1]:8080", "http://[fd00::1]:8080"),
    ],
)
def test_public_url_is_written_as_browsers_do(given: str, origin: str) -> None:
    settings = load_settings(public_url=given)

    assert (settings.people_url, settings.url) == (origin, "http://127.0.0.1:8000")


@pytest.mark.parametrize(
    "url", ["ngd.example.com", "https://", "ftp://x", "https://x/ngd", "https://x?a", "https://x:y"]
)
def test_public_url_that_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(StartupError, match=r"public_url \(NGD_PUBLIC_URL\) must be scheme, host and port alone"):
        load_settings(public_url=url)


@pytest.mark.parametrize(
    ("host", "url"),
    [("localhost", "http://127.0.0.1:8000"), ("127.0.0.2", "http://127.0.0.2:8000"), ("::1", "http://[::1]:8000")],
)
def test_loopback_addresses_are_taken(host: str, url: str) -> None:
    assert load_settings(host=host).url == url


@pytest.mark.parametrize("name", ["public_url", "worker_url", "ray_address", "kubernetes_url"])
@pytest.mark.parametrize("url", ["http://user:hush@head:8265", "http://user:hush@head:8265/", "user:hush@head"])
def test_address_with_a_password_is_refused_and_not_repeated(name: str, url: str) -> None:
    with pytest.raises(StartupError, match=rf"{name} \(NGD_{name.upper()}\) must hold no user and password") as raised:
        load_settings(**{name: url})
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["unreachable_s", "tick_s", "lease_s", "retry_backoff_s", "cancel_grace_s", "interrupt_grace_s"]
)
@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e300", "700000"])
def test_time_without_a_bound_is_refused(name: str, value: str) -> None:
    with pytest.raises(StartupError, match=rf"NGD_{name.upper()}\): input should be .*, got '{value}'"):
        load_settings(**{name: value})


def test_wrong_setting_is_named_with_its_variable_and_value() -> None:
    with pytest.raises(StartupError, match=r"NGD_MAX_RUNNING_JOBS.*greater than or equal to 1.*got 0"):
        load_settings(max_running_jobs=0)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("NGD_DRIVER_COMMAND", "foo", ["NGD_DRIVER_COMMAND", "JSON list", "'foo'"]),
        ("NGD_DRIVER_COMMAND", "7", ["NGD_DRIVER_COMMAND", "JSON list", "'7'"]),
        ("NGD_DRIVER_COMMAND", "[]", ["NGD_DRIVER_COMMAND", "at least 1 item"]),
        ("NGD_HOME", "~nosuch/x", ["~nosuch/x", "whole path"]),
        ("NGD_PORT", "high", ["NGD_PORT", "'high'"]),
    ],
)
def test_variable_that_can_not_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: list[str]
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(StartupError) as raised:
        load_settings()

    for word in words:
        assert word in str(raised.value)


def test_setting_that_can_not_be_read_ends_the_command(tmp_path: Path) -> None:
    assert_refused(serve(tmp_path / "home", NGD_PORT="high"), "NGD_PORT", "'high'")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("host", "others"), [("0.0.0.0", ["127.0.0.1"]), ("::", ["127.0.0.1", "[::1]"])])
def test_service_on_every_address_answers_on_each(
    start_service: Callable[..., ServiceProcess], tmp_path: Path, host: str, others: list[str]
) -> None:
    keys = write_keys(tmp_path / "keys", alice=ALICE)
    service = start_service(host=host, api_keys_dir=str(keys), key=ALICE)

    for other in others:
        with Client(f"http://{other}:{service.url.rpartition(':')[2]}", key=ALICE) as client:
            assert client.list_jobs().jobs == []


def test_cluster_that_could_not_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"ray_jobs needs worker_url \(NGD_WORKER_URL\).*every address \(0.0.0.0\)"):
        load_settings(host="0.0.0.0", api_keys_dir=tmp_path, dispatcher="ray_jobs", ray_address="http://head:8265")


def test_empty_variable_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGD_API_KEYS_DIR", "")

    assert load_settings().api_keys_dir is None


def test_service_on_ipv6_serves_its_pages(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service(host="::1")

    page = service.client._http.get("/")

    assert service.url.startswith("http://[::1]:")
    assert page.status_code == 200


def test_foreign_address_ends_the_command(tmp_path: Path) -> None:
    result = serve(tmp_path / "home", NGD_HOST="0.0.0.0")

    assert_refused(result, "'0.0.0.0'", "SSH tunnel")
    assert not (tmp_path / "home").exists()


def test_port_in_use_ends_the_command(tmp_path: Path, taken_port: int) -> None:
    result = serve(tmp_path / "home", NGD_PORT=str(taken_port))

    assert_refused(result, f"http://127.0.0.1:{taken_port}", "address already in use", "--port")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("sqlite:////nowhere/at/all.sqlite", "unable to open database file"),
        ("postgresql://nobody:hush@127.0.0.1:1/none", "onnection"),
    ],
)
def test_database_that_can_not_be_opened_ends_the_command(tmp_path: Path, url: str, word: str) -> None:
    result = serve(tmp_path / "home", NGD_DATABASE_URL=url)

    assert_refused(result, word)
    assert "hush" not in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("mysql://localhost/x", "sqlite or postgresql"),
        ("nonsense", "NGD_DATABASE_URL"),
        ("postgresql://nobody:hush@127.0.0.1:port/none", "its port, or another number in it, is none"),
        ("sqlite:////nowhere/at/all.sqlite?timeout=x", "another number in it"),
        ("postgresql://nobody:hush/none", "its port, or another number in it, is none"),
        ("postgresql://nobody:hush@127.0.0.1:999999/none", "NGD_DATABASE_URL"),
        ("postgresql://nobody:hush@127.0.0.1:1/none?no_such=1", "NGD_DATABASE_URL"),
        ("postgresql://nobody:hush@127.0.0.1:1/none?connect_timeout=x", "NGD_DATABASE_URL"),
        ("sqlite://nobody:hush@127.0.0.1/none", "NGD_DATABASE_URL"),
        ("sqlite+no_such:////tmp/none.sqlite", "NGD_DATABASE_URL"),
    ],
)
def test_url_of_no_database_is_refused_in_one_sentence_without_its_password(url: str, word: str) -> None:
    with pytest.raises(StartupError, match=word) as raised:
        SQLStore(url)

    assert len(str(raised.value).splitlines()) == 1
    assert "hush" not in str(raised.value)


def test_file_that_is_no_database_ends_the_command(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("these are only notes, " * 100)

    assert_refused(serve(tmp_path / "home", NGD_DATABASE_URL=f"sqlite:///{file}"), "file is not a database")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_start_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"short")
    (tmp_path / "notes.txt").write_text("mine")

    assert_refused(serve(tmp_path), "must hold 32 bytes, got 5")
    assert sorted(os.listdir(tmp_path)) == ["key", "notes.txt"]


def test_second_home_on_the_same_database_is_refused_while_jobs_of_the_first_run(
    start_service: Callable[..., ServiceProcess], tmp_path: Path, database_url: str
) -> None:
    first = start_service(database_url=database_url)
    job = first.client.submit(SPEC)
    wait_until(lambda: first.client.get(job.id).status.progress.step > 0, "the job runs")

    result = serve(tmp_path / "other", NGD_DATABASE_URL=database_url)

    assert_refused(result, f":{tmp_path / 'home'}", f":{tmp_path / 'other'}", "NGD_HOME", "NGD_DATABASE_URL")
    assert not (tmp_path / "other").exists()
    assert first.client.get(job.id).status.attempt == 1


def test_folder_of_runs_whose_parent_is_missing_ends_the_command(tmp_path: Path) -> None:
    runs = tmp_path / "none" / "runs"
    given = {"NGD_DISPATCHER": "ray_jobs", "NGD_RAY_ADDRESS": "http://127.0.0.1:1", "NGD_RUNS_DIR": str(runs)}

    result = serve(tmp_path / "home", **given)

    assert_refused(result, f"folder of runs {runs}: No such file", "set NGD_RUNS_DIR")
    assert "NGD_HOME" not in result.stderr
    assert not (tmp_path / "home").exists()


def test_home_that_is_a_file_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")

    assert_refused(serve(tmp_path / "home"), "NGD_HOME")


def test_service_stops_in_order_while_a_stream_is_open(
    start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    service = start_service()
    job = service.client.submit(SPEC)
    with service.client._http.stream("GET", f"/api/v1/jobs/{job.id}/events/stream") as stream:
        next(stream.iter_lines())
        service.client.cancel(job.id)
        service.process.terminate()
        service.process.wait(timeout=20)

    assert service.process.returncode == 0
    assert "Traceback" not in (tmp_path / "home" / "serve.txt").read_text()


def test_importing_the_service_loads_neither_torch_nor_ray() -> None:
    modules = "ngd_service.app, ngd_service.cli.commands, ngd_service.server"
    code = f"import sys, {modules}; print([m for m in ('torch', 'ray') if m in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout == "[]\n"


def test_command_line_loads_no_server() -> None:
    heavy = ("fastapi", "sqlalchemy", "nicegui")
    code = f"import sys, ngd_service.cli.commands; print([m for m in {heavy} if m in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout == "[]\n"


def test_what_the_service_keeps_is_its_users_alone(start_service: Callable[..., ServiceProcess]) -> None:
    service = start_service()
    service.client.wait(service.client.submit(SPEC | {"schedule": {"steps": 2}}).id, timeout_s=60)

    made = [path for path in service.home.rglob("*") if path.name != "serve.txt"]
    assert {path.name for path in made} >= {"ngd.sqlite", "ngd.sqlite-wal", "log.txt", "spec.json", "events.jsonl"}
    assert {str(path): oct(path.stat().st_mode) for path in (service.home, *made) if path.stat().st_mode & 0o077} == {}


def test_home_of_an_earlier_version_is_closed_to_others(start_service: Callable[..., ServiceProcess]) -> None:
    first = start_service()
    first.close()
    first.home.chmod(0o755)
    (first.home / "ngd.sqlite").chmod(0o644)

    second = start_service()

    assert [oct(path.stat().st_mode & 0o777) for path in (second.home, second.home / "ngd.sqlite")] == [
        "0o700",
        "0o600",
    ]


def test_folder_that_all_may_write_to_stays_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with owned(tmp_path):
        pass

    assert tmp_path.stat().st_mode & 0o7777 == 0o1777

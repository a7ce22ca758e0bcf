"""Two controllers on one PostgreSQL, each with a home of its own: together they are one service."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from ngd_service.job_state import Action, Decision, Phase
from ngd_service.store import sql
from ngd_service.store.base import Claim
from ngd_service.store.sql import SQLStore
from ngd_workers.contract.rundir import AttemptDir
from tests.support.attempts import fault_spec
from tests.support.deadline import wait_until
from tests.support.keys import ALICE, write_keys
from tests.support.service_process import ServiceProcess

Start = Callable[[str], ServiceProcess]
Pair = tuple[ServiceProcess, ServiceProcess]
spec = partial(fault_spec, steps=30)


@pytest.fixture
def start(tmp_path: Path, postgresql_database: str) -> Iterator[Start]:
    """Starts a controller with the home of this name; all share database, runs, keys and signing key."""
    signing_key = tmp_path / "signing-key"
    signing_key.write_text("0f" * 32 + "\n")
    shared = tmp_path / "runs"
    shared.mkdir()
    keys = write_keys(tmp_path / "keys", alice=ALICE)
    started: list[ServiceProcess] = []

    def start(name: str) -> ServiceProcess:
        service = ServiceProcess(
            tmp_path / name,
            module="tests.support.shared_service",
            key=ALICE,
            dispatcher="ray_jobs",
            ray_address="http://unused",
            runs_dir=str(shared),
            database_url=postgresql_database,
            signing_key_file=str(signing_key),
            api_keys_dir=str(keys),
            max_running_jobs=2,
        )
        started.append(service)
        return service

    yield start
    for service in started:
        service.close()


@pytest.fixture
def pair(start: Start) -> Pair:
    """Both started at once, so that both find a database without a schema."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, ("a", "b"))
    return first, second


def test_what_one_is_told_the_other_knows(pair: Pair, tmp_path: Path) -> None:
    first, second = pair
    jobs = [first.client.submit(spec(), idempotency_key=f"key-{number}") for number in range(3)]

    followed = list(second.client.follow(jobs[0].id))

    assert followed == first.client.events(jobs[0].id, limit=1000).events
    assert followed[-1].data["to"] == "SUCCEEDED"
    spool = AttemptDir.of(tmp_path / "runs" / jobs[0].id, 1).spool
    reported = [event.seq for event in followed if event.seq is not None]
    assert sorted(reported) == list(range(1, len(spool.read_bytes().splitlines()) + 1))
    assert second.client.submit(spec(), idempotency_key="key-1").id == jobs[1].id
    page = first.client.list_jobs(page_size=2)
    rest = second.client.list_jobs(page_size=2, page_token=page.next_page_token)
    assert [job.id for job in (*page.jobs, *rest.jobs)] == [job.id for job in jobs[::-1]]
    assert second.client.logs(jobs[0].id).count("attempt 1 of steps") == 1


@pytest.mark.slow
def test_attempt_and_browser_are_known_to_both(pair: Pair, tmp_path: Path) -> None:
    first, second = pair
    job = first.client.submit(spec("waits"))
    wait_until(lambda: first.client.get(job.id).status.phase == "RUNNING", "it runs", timeout_s=60)
    token = AttemptDir.of(tmp_path / "runs" / job.id, 1).read_facts().token
    login = httpx.post(f"{first.url}/login", data={"key": ALICE}, trust_env=False)

    for service in pair:
        path = f"{service.url}/api/v1/internal/attempts/{job.id}-a1/events"
        bearer = {"Authorization": f"Bearer {token}"}
        assert httpx.post(path, json={"events": []}, headers=bearer, trust_env=False).status_code == 200
        cookie = {"Cookie": "; ".join(f"{name}={value}" for name, value in login.cookies.items())}
        assert httpx.get(f"{service.url}/api/v1/jobs", headers=cookie, trust_env=False).status_code == 200
    second.client.cancel(job.id)
    assert first.client.wait(job.id, timeout_s=60).status.phase == "CANCELLED"


def test_both_together_run_no_more_jobs_than_one_may(pair: Pair) -> None:
    first, second = pair
    posted = [service.client.submit(spec(steps=20)).id for _ in range(4) for service in pair]

    ended = [first.client.wait(job_id, timeout_s=120) for job_id in posted]

    assert {(job.status.phase, job.status.attempt) for job in ended} == {("SUCCEEDED", 1)}
    changes = [(time, change) for job in ended for time, change in ((job.started_at, 1), (job.finished_at, -1)) if time]
    running, most = 0, 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    assert most == 2
    counted = [re.search(r"^ngd_attempts_started_total (\S+)", metrics(service), re.M) for service in pair]
    assert sum(float(found.group(1)) for found in counted if found) == len(posted)
    assert [job.id for job in second.client.list_jobs(page_size=100).jobs] == sorted(posted, reverse=True)


def metrics(service: ServiceProcess) -> str:
    return httpx.get(f"{service.url}/metrics", trust_env=False).text


def test_one_that_is_killed_is_replaced_by_the_other(pair: Pair) -> None:
    first, second = pair
    job = first.client.submit(spec(steps=200))
    wait_until(lambda: second.client.get(job.id).status.progress.step > 5, "it trains", timeout_s=60)

    first.kill()

    ended = second.client.wait(job.id, timeout_s=90)
    assert (ended.status.phase, ended.status.attempt, ended.status.progress.step) == ("SUCCEEDED", 1, 200)
    loss = second.client.metrics(job.id, names=["loss"], max_points=10_000).series["loss"]
    assert loss.steps == list(range(1, 201))


@pytest.mark.slow
def test_rolling_upgrade_takes_the_jobs_along(start: Start) -> None:
    """A new controller comes up beside the old one, which then ends in order."""
    old = start("a")
    job = old.client.submit(spec(steps=150))
    wait_until(lambda: old.client.get(job.id).status.progress.step > 5, "it trains", timeout_s=60)

    new = start("b")
    old.process.terminate()
    assert old.process.wait(timeout=20) == 0

    ended = new.client.wait(job.id, timeout_s=90)
    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)


def test_claims_at_the_same_time_do_not_both_count_the_same_free_slot(
    postgresql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = SQLStore(postgresql_database), SQLStore(postgresql_database)
    now = datetime.now(UTC)
    for number in range(2):
        first.create_job(f"job_{number}", "small", spec(), now)
    count, others = sql.num_taken, list[Claim]()

    def interrupted(connection: sa.Connection, now: datetime) -> int:
        taken = count(connection, now)
        monkeypatch.setattr(sql, "num_taken", count)
        for claim in second.claim(lease_token="second", now=now, lease_s=10, max_running=1):
            second.apply(claim, Decision(Phase.STARTING, action=Action.NEW_ATTEMPT), now)
            second.release(claim)
            others.append(claim)
        return taken

    monkeypatch.setattr(sql, "num_taken", interrupted)
    mine = first.claim(lease_token="first", now=now, lease_s=10, max_running=1)
    first.close()
    second.close()

    assert len(mine) + len(others) == 1


def test_controller_that_vanishes_in_a_transaction_gives_its_locks_back(
    postgresql_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngd_service.store.engine.SILENCE_TIMEOUT_S", 1)
    store, vanished = SQLStore(postgresql_database), SQLStore(postgresql_database)
    now = datetime.now(UTC)
    store.create_job("job_1", "small", spec(), now)
    connection = vanished._writers.connect()
    connection.execute(sa.text("SELECT id FROM jobs FOR UPDATE"))
    assert store.claim(lease_token="early", now=now, lease_s=10, max_running=1) == []

    wait_until(lambda: store.claim(lease_token="late", now=now, lease_s=10, max_running=1), "the job is free again")

    connection.invalidate()
    connection.close()
    vanished.close()
    store.close()


def migrate(url: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from ngd_service.cli.commands import main; main(['migrate'])"],
        env=os.environ | {"NGD_DATABASE_URL": url, "NGD_HOME": str(home), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_migrations_may_be_started_at_once(postgresql_database: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: migrate(postgresql_database, tmp_path / "home"), range(3)))

    assert [(result.returncode, result.stderr) for result in done] == [(0, "")] * 3
    assert {result.stdout.partition(" is at ")[2] for result in done} == {"revision 0004\n"}
    assert not (tmp_path / "home").exists()


def test_migrating_says_what_hinders_it_without_the_password(tmp_path: Path) -> None:
    result = migrate("postgresql://ngd:hush@127.0.0.1:1/ngd", tmp_path)

    assert (result.returncode, result.stdout) == (2, "")
    assert "can't open the database postgresql+psycopg://ngd:***@127.0.0.1:1/ngd" in result.stderr
    assert "hush" not in result.stderr


def test_local_attempts_keep_a_database_to_one_home_whatever_the_signing_key(
    tmp_path: Path, postgresql_database: str
) -> None:
    signing_key = tmp_path / "signing-key"
    signing_key.write_bytes(b"k" * 32)
    given = {"database_url": postgresql_database, "signing_key_file": str(signing_key)}
    ServiceProcess(tmp_path / "a", **given).close()

    with pytest.raises(AssertionError, match=r"belongs to the service whose home is .*/a, and this one's is .*/b"):
        ServiceProcess(tmp_path / "b", **given)
    ServiceProcess(tmp_path / "a", **given).close()

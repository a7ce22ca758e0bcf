"""The list of jobs: its filters and orders on each database, and that ten thousand jobs cost no more than a hundred."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from ngd_service.api.application import api_application
from ngd_service.app import _assemble
from ngd_service.job_state import Desired, Phase
from ngd_service.settings import load_settings
from ngd_service.store import tables as t
from ngd_service.store.base import Cursor, JobQuery
from ngd_service.store.sql import SQLStore
from tests.support.attempts import small_spec

NOW = datetime(2030, 1, 2, 12, tzinfo=UTC)
SPEC = small_spec().model_dump(mode="json")
PHASES = (Phase.QUEUED, Phase.SUCCEEDED, Phase.RUNNING, Phase.FAILED, Phase.QUEUED, Phase.STARTING, Phase.CANCELLED)


def row(number: int, phase: Phase = Phase.SUCCEEDED) -> dict[str, Any]:
    spec = SPEC | {
        "optimizer": {"kind": "ngd" if number % 2 else "sgd", "lr": number / 8},
        "labels": {"team": "vision" if number % 3 else "text"},
    }
    target = {"target": {"step": 100 - number % 5, "seconds": 0.1 * number}} if number % 4 else {}
    return {
        "id": f"job_{number:05}",
        "name": f"run-{number % 7}",
        "spec": spec,
        "desired": Desired.RUNNING,
        "phase": phase,
        "attempt": 1,
        "max_attempts": 1,
        "progress": {"step": number, **target},
        "metrics_latest": {},
        "created_at": NOW + timedelta(seconds=number),
        "created_by": "ada" if number % 2 else "grace",
        "resource_version": 1,
    }


def fill(store: SQLStore, rows: list[dict[str, Any]]) -> None:
    with store._writers.begin() as connection:
        connection.execute(sa.insert(t.jobs), rows)


def pages(store: SQLStore, query: JobQuery, size: int = 3) -> list[str]:
    """Returns the ids of all pages, one after the other."""
    ids: list[str] = []
    after: Cursor | None = None
    while True:
        listed = store.list_jobs(query, after=after, limit=size)
        ids += [job.id for job in listed.jobs]
        after = listed.next
        if after is None:
            return ids


@pytest.fixture
def jobs(store: SQLStore) -> list[dict[str, Any]]:
    rows = [row(number, PHASES[number % 7]) for number in range(1, 22)]
    fill(store, rows)
    return rows


def test_running_jobs_come_first_then_the_queue_in_its_order_then_the_ended(
    store: SQLStore, jobs: list[dict[str, Any]]
) -> None:
    of_phase = {job["id"]: job["phase"] for job in jobs}
    active, waiting = {Phase.RUNNING, Phase.STARTING}, {Phase.QUEUED}
    newest = sorted(of_phase, reverse=True)

    assert pages(store, JobQuery(order="state")) == [
        *(job_id for job_id in newest if of_phase[job_id] in active),
        *(job_id for job_id in sorted(of_phase) if of_phase[job_id] in waiting),
        *(job_id for job_id in newest if of_phase[job_id] not in active | waiting),
    ]


@pytest.mark.parametrize("is_descending", [False, True])
@pytest.mark.parametrize("order", ["name", "owner", "optimizer", "lr", "target_step", "target_s"])
def test_pages_of_each_order_hold_each_job_once_and_those_without_a_value_last(
    store: SQLStore, jobs: list[dict[str, Any]], order: Any, is_descending: bool
) -> None:
    values = {
        job["id"]: {
            "name": job["name"],
            "owner": job["created_by"],
            "optimizer": job["spec"]["optimizer"]["kind"],
            "lr": job["spec"]["optimizer"]["lr"],
            "target_step": job["progress"].get("target", {}).get("step"),
            "target_s": job["progress"].get("target", {}).get("seconds"),
        }[order]
        for job in jobs
    }
    newest = sorted(values, reverse=True)
    known = [job_id for job_id in newest if values[job_id] is not None]

    listed = pages(store, JobQuery(order=order, is_descending=is_descending))

    assert listed[: len(known)] == sorted(known, key=lambda job_id: values[job_id], reverse=is_descending)
    assert listed[len(known) :] == [job_id for job_id in newest if values[job_id] is None]


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        (JobQuery(is_descending=False, text="run-1"), [1, 8, 15]),
        (JobQuery(text="RUN-3"), [17, 10, 3]),
        (JobQuery(text="00021"), [21]),
        (JobQuery(text="%"), []),
        (JobQuery(optimizers=["sgd"], phases=[Phase.RUNNING]), [16, 2]),
        (JobQuery(owners=["ada"], text="run-0"), [21, 7]),
        (JobQuery(labels=[("team", "text")], phases=[Phase.QUEUED]), [21, 18]),
        (JobQuery(labels=[("team", None)], text="run-6"), [20, 13, 6]),
        (JobQuery(labels=[("stage", None)]), []),
        (JobQuery(text="run-2", order="state", phases=[Phase.RUNNING]), [16, 9, 2]),
    ],
)
def test_list_has_the_jobs_that_pass_all_filters(
    store: SQLStore, jobs: list[dict[str, Any]], query: JobQuery, numbers: list[int]
) -> None:
    assert pages(store, query, size=2) == [f"job_{number:05}" for number in numbers]


def work(store: SQLStore, query: JobQuery, after: Cursor | None = None) -> tuple[int, int]:
    """Returns the statements of a page, and the instructions of SQLite's machine in hundreds: no clock is in it."""
    counts = [0, 0]

    def count(*_: Any) -> None:
        counts[0] += 1

    def tick() -> int:
        counts[1] += 1
        return 0

    with store._writers.connect() as connection:
        connection.connection.driver_connection.set_progress_handler(tick, 100)  # type: ignore[union-attr]
    sa.event.listen(store._writers, "before_cursor_execute", count)
    store.list_jobs(query, after=after, limit=50)
    sa.event.remove(store._writers, "before_cursor_execute", count)
    return counts[0], counts[1]


@pytest.fixture
def long_list(tmp_path: Path) -> Iterator[SQLStore]:
    store = SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}")
    yield store
    store.close()


def test_page_of_ten_thousand_jobs_takes_the_work_of_a_page_of_a_hundred(long_list: SQLStore) -> None:
    fill(long_list, [row(number, Phase.RUNNING if number % 50 == 0 else Phase.SUCCEEDED) for number in range(100)])
    _, of_hundred = work(long_list, JobQuery(order="state"))
    fill(long_list, [row(number) for number in range(100, 10_000)])

    num_queries, of_ten_thousand = work(long_list, JobQuery(order="state"))
    _, in_the_middle = work(long_list, JobQuery(order="state"), (2, "job_05000"))

    assert 1 <= num_queries <= 4  # and the transaction's begin
    assert 0 < of_ten_thousand <= 2 * of_hundred + 5
    assert in_the_middle <= 2 * of_hundred + 5


def test_answer_of_a_page_of_ten_thousand_waiting_jobs_is_bounded(tmp_path: Path) -> None:
    parts = _assemble(load_settings(home=tmp_path))
    assert isinstance(parts.store, SQLStore)
    fill(parts.store, [row(number, Phase.QUEUED) for number in range(10_000)])
    num_rows = [0]

    def counted(_: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
        num_rows[0] += 1
        return values

    @sa.event.listens_for(parts.store._writers, "checkout")
    def _count(connection: Any, *_: Any) -> None:
        connection.row_factory = counted

    answer = TestClient(api_application(None, parts), "http://127.0.0.1").get(
        "/api/v1/jobs?order_by=state&page_size=50"
    )

    assert answer.status_code == 200, answer.text
    jobs = answer.json()["jobs"]
    assert [job["status"]["message"].partition(":")[0] for job in jobs[:2]] == [
        "number 1 of 10000 in the queue",
        "number 2 of 10000 in the queue",
    ]
    assert len(jobs) == 50
    assert len(answer.content) < 200_000
    assert 100 < num_rows[0] < 110  # a job and its place each, and one more job that says that there is another page
    parts.store.close()


def test_list_over_http_has_filters_and_says_what_it_takes(tmp_path: Path) -> None:
    parts = _assemble(load_settings(home=tmp_path))
    assert isinstance(parts.store, SQLStore)
    fill(parts.store, [row(number) for number in range(1, 7)])
    http = TestClient(api_application(None, parts), "http://127.0.0.1")

    wanted = "/api/v1/jobs?optimizer=ngd&label=team=vision&owner=ada&order_by=-target_s&page_size=1"
    first = http.get(wanted).json()
    rest = http.get(f"{wanted}&page_token={first['next_page_token']}").json()
    wrong = http.get("/api/v1/jobs?order_by=speed").json()
    foreign = http.get(f"/api/v1/jobs?page_token={first['next_page_token']}").json()

    assert [job["name"] for job in (*first["jobs"], *rest["jobs"])] == ["run-5", "run-1"]
    assert first["jobs"][0]["status"]["progress"]["target_s"] == pytest.approx(0.5)
    assert wrong["detail"].startswith("order_by must be one of created, state, name,")
    assert foreign["code"] == "page_token_mismatch" or "other filters" in foreign["detail"]
    parts.store.close()

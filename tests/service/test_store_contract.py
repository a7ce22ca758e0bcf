"""What every store must do, on each database it may be on."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from ulid import ULID

from ngd_service.errors import IdempotencyError, NotFoundError, StaleAttemptError, StartupError
from ngd_service.job_state import Action, Decision, Phase
from ngd_service.store.base import Claim, JobCounts, JobQuery, JobRecord, KeyedRequest, Listed, Queue, Store
from ngd_service.store.spans import Name, Span, Wanted
from ngd_service.store.sql import SQLStore
from ngd_service.store.tables import metadata
from ngd_workers.contract.events import Evaluation, Event, Numbered, Steps
from tests.support.attempts import small_spec
from tests.support.fault_driver import step_record

NOW = datetime(2030, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
SPEC = small_spec().model_dump(mode="json")


def create(store: Store, **given: Any) -> JobRecord:
    return store.create_job(f"job_{ULID()}", "small", SPEC, NOW, **given)[0]


def claim_all(store: Store, token: str = "lease", now: datetime = NOW, max_running: int = 1) -> list[Claim]:
    return store.claim(lease_token=token, now=now, lease_s=10, max_running=max_running)


def start(store: Store) -> Claim:
    """A job with a live attempt, under lease."""
    create(store)
    (claim,) = claim_all(store)
    assert store.apply(claim, Decision(Phase.STARTING, action=Action.NEW_ATTEMPT), NOW)
    store.release(claim)
    return claim_all(store)[0]


def steps(seq: int, *numbers: int, loss: float = 1.0) -> Numbered:
    records = [step_record(number, loss) for number in numbers]
    return Numbered(seq=seq, time_s=NOW.timestamp(), event=Steps(records=records))


def event(seq: int, fact: Event) -> Numbered:
    return Numbered(seq=seq, time_s=NOW.timestamp(), event=fact)


def seqs(store: Store, job_id: str) -> list[int | None]:
    return [record.seq for record in store.events_after(job_id, 0, 100) if record.seq is not None]


def losses(store: Store, job_id: str) -> list[tuple[Any, ...]]:
    return [(span.last_step, *extremes(span, "loss")) for span in points(store, job_id)]


def extremes(span: Span, name: str) -> list[Any]:
    """The value of a span of one step, in the place that it has: lowest and highest, or not finite."""
    return [sample and sample[1] for sample in span.content[name]]


def points(store: Store, job_id: str, from_step: int = 0, kind: Name = "curves") -> list[Span]:
    return store.spans(job_id, kind, Wanted(from_step=from_step, most_steps=10_000, most_spans=10)).spans


def test_job_reads_back_as_it_was_created(store: SQLStore) -> None:
    job = create(store)

    assert store.get_job(job.id) == job
    assert (job.spec, job.created_at, job.state.phase) == (SPEC, NOW, Phase.QUEUED)
    assert [record.data["to"] for record in store.events_after(job.id, 0, 10)] == ["QUEUED"]


def test_jobs_are_listed_newest_first_and_by_phase(store: SQLStore) -> None:
    first, second = create(store), create(store)
    store.request_cancel(first.id, NOW)

    newest = store.list_jobs(JobQuery(), after=None, limit=1)
    assert ([job.id for job in newest.jobs], newest.next) == ([second.id], (None, second.id))
    assert [job.id for job in store.list_jobs(JobQuery(), after=newest.next, limit=9).jobs] == [first.id]
    assert store.list_jobs(JobQuery(phases=[Phase.RUNNING]), after=None, limit=9) == Listed([], None)


def test_queue_is_in_the_order_of_starting_without_those_that_are_cancelled(store: SQLStore) -> None:
    start(store)
    waiting = [create(store) for _ in range(3)]
    store.request_cancel(waiting[1].id, NOW)

    ids = [job.id for job in waiting]
    assert store.queue(ids) == Queue({ids[0]: 1, ids[2]: 2}, num_waiting=2, num_active=1)
    assert store.queue(ids[2:]).places == {ids[2]: 2}


def test_same_key_and_request_give_the_same_job(store: SQLStore) -> None:
    keyed = KeyedRequest("k", "f")

    job = create(store, keyed=keyed)

    assert store.create_job("job_other", "small", SPEC, NOW, keyed)[0].id == job.id
    assert store.get_job("job_other") is None


def test_same_key_with_another_request_is_refused(store: SQLStore) -> None:
    create(store, keyed=KeyedRequest("k", "f"))

    with pytest.raises(IdempotencyError, match="'k'"):
        create(store, keyed=KeyedRequest("k", "g"))


def test_key_is_forgotten_after_a_day(store: SQLStore) -> None:
    keyed = KeyedRequest("k", "f")
    job = create(store, keyed=keyed)

    later = store.create_job("job_later", "small", SPEC, NOW + timedelta(hours=25), keyed)[0]

    assert later.id != job.id


def test_holders_of_api_keys_have_keys_of_their_own(store: SQLStore) -> None:
    made = [create(store, keyed=KeyedRequest("k", "f", name), created_by=name).id for name in ("alice", "bob", None)]
    again = [create(store, keyed=KeyedRequest("k", "f", name), created_by=name).id for name in ("alice", "bob", None)]

    assert made == again
    assert len(set(made)) == 3


def test_key_that_an_older_version_stored_is_still_its_holders(store: SQLStore) -> None:
    older = create(store, keyed=KeyedRequest("k", "f"), created_by="alice")

    assert create(store, keyed=KeyedRequest("k", "f", "alice"), created_by="alice").id == older.id
    assert create(store, keyed=KeyedRequest("k", "f", "bob"), created_by="bob").id != older.id


def test_many_requests_with_one_key_at_once_make_one_job(store: SQLStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create(store, keyed=KeyedRequest("k", "f")).id, range(8)))

    assert len(set(made)) == 1
    assert len(store.list_jobs(JobQuery(), after=None, limit=99).jobs) == 1


def test_claim_gives_out_waiting_jobs_in_order_up_to_the_limit(store: SQLStore) -> None:
    ids = [create(store).id for _ in range(3)]

    claimed = [claim.job.id for claim in claim_all(store, max_running=2)]

    assert claimed == ids[:2]
    assert claim_all(store, "other", max_running=2) == []


def test_lease_that_has_run_out_passes_to_another_and_the_first_may_no_longer_write(store: SQLStore) -> None:
    create(store)
    (late,) = claim_all(store, "late")

    (taken,) = claim_all(store, "taken", now=NOW + timedelta(seconds=11))

    decision = Decision(Phase.STARTING, action=Action.NEW_ATTEMPT)
    assert not store.apply(late, decision, NOW)
    assert store.apply(taken, decision, NOW)
    assert store.get_attempt(f"{taken.job.id}-a1") is not None


def test_transition_stores_phase_event_and_attempt_together(store: SQLStore) -> None:
    claim = start(store)

    job = store.get_job(claim.job.id)

    assert job is not None
    assert (job.state.phase, job.attempt, job.started_at) == (Phase.STARTING, 1, NOW)
    assert claim.attempt is not None
    assert claim.attempt.id == f"{job.id}-a1"
    assert [record.data["to"] for record in store.events_after(job.id, 0, 10)] == ["QUEUED", "STARTING"]


def test_cancelled_waiting_job_is_claimed_without_a_slot(store: SQLStore) -> None:
    job = create(store)
    store.request_cancel(job.id, NOW)

    assert [claim.job.id for claim in claim_all(store, max_running=0)] == [job.id]


def test_cancelling_twice_changes_nothing(store: SQLStore) -> None:
    job = create(store)

    once = store.request_cancel(job.id, NOW)

    assert store.request_cancel(job.id, NOW + timedelta(seconds=5)) == once
    assert store.request_cancel("job_none", NOW) is None


def test_repeated_delivery_changes_nothing(store: SQLStore) -> None:
    claim = start(store)
    delivery = [steps(1, 1, 2), steps(2, 3)]
    first = store.ingest(f"{claim.job.id}-a1", delivery)
    before = store.get_job(claim.job.id), points(store, claim.job.id), store.events_after(claim.job.id, 0, 100)

    again = store.ingest(f"{claim.job.id}-a1", [*delivery, *delivery])

    after = store.get_job(claim.job.id), points(store, claim.job.id), store.events_after(claim.job.id, 0, 100)
    assert (first.new_events, again.new_events, again.acknowledged_seq) == (2, 0, 2)
    assert after == before


def test_acknowledged_seq_is_the_last_without_a_gap(store: SQLStore) -> None:
    claim = start(store)
    attempt = f"{claim.job.id}-a1"

    assert store.ingest(attempt, [steps(1, 1), steps(3, 3)]).acknowledged_seq == 1
    assert store.ingest(attempt, [steps(2, 2)]).acknowledged_seq == 3
    assert sorted(seqs(store, claim.job.id)) == [1, 2, 3]
    assert store.ingest(attempt, []).acknowledged_seq == 3


def test_step_redone_after_a_resume_replaces_the_old_one_in_whatever_order_they_come(store: SQLStore) -> None:
    claim = start(store)
    attempt = f"{claim.job.id}-a1"

    store.ingest(attempt, [steps(2, 1, loss=22.0), steps(3, 2, loss=33.0)])
    store.ingest(attempt, [steps(1, 1, 2, loss=11.0)])

    assert losses(store, claim.job.id) == [(1, 22.0, 22.0, None), (2, 33.0, 33.0, None)]


def test_numbers_that_are_not_finite_survive(store: SQLStore) -> None:
    claim = start(store)

    store.ingest(f"{claim.job.id}-a1", [steps(1, 1, loss=float("nan"))])

    job = store.get_job(claim.job.id)
    assert job is not None
    assert job.metrics_latest["loss"] == "NaN"
    assert losses(store, claim.job.id) == [(1, None, None, "NaN")]


def test_progress_and_newest_metrics_follow_the_events(store: SQLStore) -> None:
    claim = start(store)
    tested = Evaluation(step=2, epoch=0.2, metrics={"accuracy": 0.8, "loss": 0.5})

    store.ingest(f"{claim.job.id}-a1", [steps(1, 1, 2, loss=0.25), event(2, tested)])

    job = store.get_job(claim.job.id)
    assert job is not None
    assert job.progress["step"] == 2
    assert (job.metrics_latest["loss"], job.metrics_latest["test_accuracy"]) == (0.25, 0.8)
    assert [span.last_step for span in points(store, claim.job.id, kind="evaluations")] == [2]


def test_reports_of_an_ended_attempt_are_refused(store: SQLStore) -> None:
    claim = start(store)
    store.apply(claim, Decision(Phase.RECOVERING, ends_attempt=True), NOW)

    with pytest.raises(StaleAttemptError, match="attempt 1"):
        store.ingest(f"{claim.job.id}-a1", [steps(1, 1)])
    assert points(store, claim.job.id) == []


def test_reports_of_an_unknown_attempt_are_refused(store: SQLStore) -> None:
    with pytest.raises(NotFoundError, match="'job_x-a1'"):
        store.ingest("job_x-a1", [])


def test_event_ids_grow_and_none_is_skipped_by_a_cursor_while_others_write(store: SQLStore) -> None:
    claim = start(store)
    attempt = f"{claim.job.id}-a1"
    with ThreadPoolExecutor(4) as pool:
        deliveries = [pool.submit(store.ingest, attempt, [steps(seq, seq)]) for seq in range(1, 41)]
        seen, cursor = list[int | None](), 0
        while len(seen) < 42:
            news = store.events_after(claim.job.id, cursor, 7)
            seen += [record.seq for record in news]
            cursor = news[-1].id if news else cursor
        for delivery in deliveries:
            delivery.result()

    assert sorted(seq for seq in seen if seq is not None) == list(range(1, 41))


def test_large_delivery_is_stored_whole(store: SQLStore) -> None:
    claim = start(store)

    store.ingest(f"{claim.job.id}-a1", [steps(1, *range(1, 1501))])

    assert [span.last_step for span in points(store, claim.job.id, 1400)] == list(range(1400, 1501))


def test_migrations_make_exactly_the_tables(database_url: str) -> None:
    SQLStore(database_url).close()

    engine = sa.create_engine(database_url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()

    assert differences == []


def test_opening_a_database_again_keeps_what_is_in_it(database_url: str) -> None:
    first = SQLStore(database_url)
    job = create(first)
    first.close()

    second = SQLStore(database_url)

    assert second.get_job(job.id) == job
    second.check()
    second.close()


def test_database_is_one_installations(store: SQLStore) -> None:
    store.bind("first", "here:/a")
    store.bind("first", "here:/a")

    with pytest.raises(StartupError, match=r"here:/a, and this one's is there:/b.*NGD_HOME.*NGD_DATABASE_URL"):
        store.bind("second", "there:/b")


def test_schema_that_a_newer_version_has_added_to_is_taken(store: SQLStore, database_url: str) -> None:
    with store._writers.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0999'"))
        connection.execute(sa.text("ALTER TABLE jobs ADD COLUMN new VARCHAR(9)"))
    store.check()

    again = SQLStore(database_url)

    assert again.get_job(create(again).id) is not None
    assert again.revision == "0999"
    again.close()


def test_census_counts_phases_and_knows_the_oldest_and_the_last_heard_of(store: SQLStore) -> None:
    assert store.job_counts() == JobCounts({}, None, {}, {})
    claim = start(store)
    store.apply(claim, Decision(Phase.RUNNING), NOW)
    later = NOW + timedelta(seconds=30)
    store.ingest(f"{claim.job.id}-a1", [Numbered(seq=1, time_s=later.timestamp(), event=steps(1, 1).event)])
    create(store)
    store.create_job(f"job_{ULID()}", "small", SPEC, later)

    assert store.job_counts() == JobCounts({Phase.RUNNING: 1, Phase.QUEUED: 2}, NOW, {claim.job.id: later}, {})


def test_census_knows_how_long_a_job_has_been_on_its_way(store: SQLStore) -> None:
    claim, later = start(store), NOW + timedelta(seconds=90)
    store.ingest(f"{claim.job.id}-a1", [Numbered(seq=1, time_s=later.timestamp(), event=steps(1, 1).event)])
    assert store.job_counts().in_phase_since == {Phase.STARTING: NOW}  # what workers tell does not count

    store.apply(claim, Decision(Phase.CANCELLING), later)

    assert store.job_counts().in_phase_since == {Phase.CANCELLING: later}


def test_job_says_who_created_it(store: SQLStore) -> None:
    job, _ = store.create_job("job_1", "small", SPEC, NOW, created_by="alice")

    assert job.created_by == "alice"
    assert store.get_job("job_1") == job


def test_database_of_a_newer_version_is_refused(store: SQLStore, database_url: str) -> None:
    with store._writers.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(StartupError, match=r"another version of ngd-dist .*'9999'.*NGD_DATABASE_URL"):
        SQLStore(database_url)

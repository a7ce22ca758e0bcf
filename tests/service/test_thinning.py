"""The thinned history of a job, on each database: right in all levels, whatever comes late, and bounded to read."""

import json
import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from ngd_service.api.series import curves, spans_for
from ngd_service.job_state import Action, Decision
from ngd_service.store import tables as t
from ngd_service.store.base import Claim, Store
from ngd_service.store.spans import KINDS, Name, Span, Wanted, fold
from ngd_service.store.sql import SQLStore
from ngd_service.store.thinning import MOST_RECORDS
from ngd_workers.contract.events import Evaluation, StepRecord, Steps
from tests.support.history import long_record, numbered, start_job, tell

NOW = datetime(2030, 1, 2, tzinfo=UTC)
MOST = Wanted(most_steps=20, most_spans=20)


def deliver(store: Store, claim: Claim, seq: int, steps: Sequence[StepRecord], attempt: int = 1) -> None:
    store.ingest(f"{claim.job.id}-a{attempt}", [numbered(seq, Steps(records=list(steps)))])


def levels(store: SQLStore, job_id: str, name: Name) -> dict[int, list[Span]]:
    """All spans that are stored, by level."""
    query = sa.select(t.spans).where(t.spans.c.job_id == job_id, t.spans.c.kind == name)
    found: dict[int, list[Span]] = {}
    with store._readers.begin() as connection:
        for row in connection.execute(query.order_by(t.spans.c.level, t.spans.c.number)):
            found.setdefault(row.level, []).append(Span(row.last_step, json.loads(row.json)))
    return found


def expected(name: Name, records: Sequence[StepRecord], level: int) -> list[Span]:
    """The level made of all records at once."""
    kind = KINDS[name]
    alone = [Span(r.step, kind.of_record(json.loads(r.model_dump_json()))) for r in records]
    return [Span(span.last_step, json.loads(json.dumps(span.content))) for span in fold(kind, alone, level)]


def assert_thinned(store: SQLStore, claim: Claim, records: Sequence[StepRecord]) -> None:
    for name in ("curves", "statistics"):
        stored = levels(store, claim.job.id, name)
        assert list(stored) == [3, 5, 7, 9]
        for level, spans in stored.items():
            assert spans == expected(name, records, level), (name, level)


def test_every_level_holds_what_its_steps_hold(store: SQLStore) -> None:
    claim, records = start_job(store), [long_record(step, 3) for step in range(1, 301)]

    for seq, start in enumerate(range(0, 300, 7), start=1):
        deliver(store, claim, seq, records[start : start + 7])

    assert_thinned(store, claim, records)


def test_steps_that_come_late_are_in_every_level(store: SQLStore) -> None:
    claim, records = start_job(store), [long_record(step, 3) for step in range(1, 301)]

    for seq in (3, 1, 2):
        deliver(store, claim, seq, records[(seq - 1) * 100 : seq * 100])

    assert_thinned(store, claim, records)


def test_steps_that_a_later_attempt_redoes_are_gone_from_every_level(store: SQLStore) -> None:
    claim, records = start_job(store), [long_record(step, 3) for step in range(1, 301)]
    lost = [long_record(step, 3, math.nan if step == 250 else 1e9) for step in range(101, 301)]
    deliver(store, claim, 1, [*records[:100], *lost])
    store.apply(claim, Decision(action=Action.NEW_ATTEMPT, ends_attempt=True), NOW)

    deliver(store, claim, 1, records[100:], attempt=2)

    assert_thinned(store, claim, records)


@pytest.mark.parametrize("is_read_first", [True, False])
def test_history_of_an_older_version_is_thinned(store: SQLStore, database_url: str, *, is_read_first: bool) -> None:
    """By the next start of this version, or before by whoever reads it."""
    claim, records = start_job(store), [long_record(step, 3) for step in range(1, 301)]
    for seq in range(1, 31):
        deliver(store, claim, seq, records[(seq - 1) * 10 : seq * 10])
    with store._writers.begin() as connection:
        connection.execute(sa.delete(t.spans))
        connection.execute(sa.update(t.attempts).values(thinned_seq=None))

    if is_read_first:
        store.spans(claim.job.id, "curves", MOST)
    else:
        SQLStore(database_url).close()

    assert_thinned(store, claim, records)


def test_steps_that_an_older_version_took_in_beside_this_one_are_thinned_with_the_next(store: SQLStore) -> None:
    claim, records = start_job(store), [long_record(step, 3) for step in range(1, 301)]
    deliver(store, claim, 1, records[:100])
    deliver(store, claim, 2, records[100:200])
    with store._writers.begin() as connection:  # as if the second had gone to the older one
        connection.execute(sa.update(t.attempts).values(thinned_seq=1))
        connection.execute(sa.delete(t.spans).where(t.spans.c.last_step.between(105, 200)))

    deliver(store, claim, 3, records[200:])

    assert_thinned(store, claim, records)


@pytest.mark.parametrize("from_step", [0, 1, 777, 2990])
def test_answer_is_as_fine_as_its_bound_allows(store: SQLStore, from_step: int) -> None:
    claim = start_job(store)
    tell(store, f"{claim.job.id}-a1", 3_000)

    for name in ("curves", "statistics"):
        known = store.spans(claim.job.id, name, replace(MOST, from_step=from_step))
        begin = (max(from_step, 1) - 1) // known.width * known.width + 1
        assert known.width == (1 if from_step == 2990 else 256 if from_step < 2 else 128)
        assert [span.last_step for span in known.spans] == [
            min(step + known.width - 1, 3_000) for step in range(begin, 3_001, known.width)
        ]


def test_columns_of_a_given_width_begin_at_its_multiples(store: SQLStore) -> None:
    claim = start_job(store)
    tell(store, f"{claim.job.id}-a1", 3_000)

    known = store.spans(claim.job.id, "statistics", replace(MOST, from_step=2_950, width=64))

    assert (known.width, [span.last_step for span in known.spans]) == (64, [3_000])
    assert known.spans[0].content["refreshes"] == [4, 4]  # in the steps 2945, 2961, 2977 and 2993
    assert known.spans[0].content["ages"] == [7, 7]


def test_curve_of_a_long_job_keeps_its_ends_and_its_one_value_that_is_not_finite(store: SQLStore) -> None:
    claim = start_job(store)
    seq = tell(store, f"{claim.job.id}-a1", 5_000)
    deliver(store, claim, seq, [long_record(1_234, 2, math.nan), long_record(4_321, 2, 77.0)])

    known = store.spans(claim.job.id, "curves", Wanted(most_steps=100, most_spans=spans_for(100)))
    loss = curves(known, {"loss"})["loss"]

    assert (loss.steps[0], loss.steps[-1]) == (1, 5_000)
    assert [step for step, value in zip(loss.steps, loss.values, strict=True) if math.isnan(value)] == [1_234]
    assert loss.values[loss.steps.index(4_321)] == max(value for value in loss.values if value < math.inf) == 77.0
    assert len(loss.steps) <= 100


def test_evaluations_of_each_step_are_thinned_too(store: SQLStore) -> None:
    claim = start_job(store)
    done = [Evaluation(step=s, epoch=s / 10, metrics={"accuracy": 0.5, "loss": 1 / s}) for s in range(1, 2_501)]
    store.ingest(f"{claim.job.id}-a1", [numbered(seq, event) for seq, event in enumerate(done, start=1)])

    known = store.spans(claim.job.id, "evaluations", Wanted(most_steps=100, most_spans=49))

    test_loss = curves(known, {"test_loss"})["test_loss"]
    assert len(test_loss.steps) <= 100
    assert (test_loss.values[0], test_loss.values[-1]) == (1.0, 1 / 2_500)
    assert known.last_step == 2_500


def test_newest_events_of_some_kinds_are_found_among_many_others(store: SQLStore) -> None:
    claim = start_job(store)
    tell(store, f"{claim.job.id}-a1", 5_000)

    found = store.newest_events(claim.job.id, ["evaluation", "phase", "none"], 0, 5)

    everything = store.events_after(claim.job.id, 0, 1_000)
    assert found == [event for event in everything if event.kind in ("evaluation", "phase")][-5:]
    assert store.newest_events(claim.job.id, ["evaluation"], found[-2].id, 5) == found[-1:]


def test_memory_that_a_read_takes_does_not_grow_with_the_job(store: SQLStore) -> None:
    claim = start_job(store)
    peaks = []

    seq = 1
    for num_steps in (2 * MOST_RECORDS, 8 * MOST_RECORDS):
        while seq * 500 <= num_steps:
            deliver(store, claim, seq, [long_record(step, 16) for step in range((seq - 1) * 500 + 1, seq * 500 + 1)])
            seq += 1
        store.spans(claim.job.id, "curves", Wanted(most_steps=1000, most_spans=499))  # what is cached once
        tracemalloc.start()
        known = store.spans(claim.job.id, "curves", Wanted(most_steps=1000, most_spans=499))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert 499 / 2 <= len(known.spans) <= 499

    assert peaks[1] < 2 * peaks[0]

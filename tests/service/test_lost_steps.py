"""What the store makes of steps that nobody told of, of attempts that never started, and of those that wait."""

from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngd_service import resources
from ngd_service.api.serializers import job_resource
from ngd_service.dashboard.activity import words
from ngd_service.errors import StaleAttemptError
from ngd_service.job_state import Action, Decision, Phase
from ngd_service.store.base import Claim
from ngd_service.store.holes import add_range, gaps, remove_ranges
from ngd_service.store.progress import remark
from ngd_service.store.spans import Wanted
from ngd_service.store.sql import SQLStore
from ngd_workers.contract.events import Cancelled, Done, Event, Started, StepsLost, Waiting
from tests.service.test_store_contract import NOW, claim_all, create, event, start, steps

ranges = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=8)


def started(resumed_step: int = 0) -> Event:
    return Started(
        spec={}, seed=0, commit=None, versions={}, world_size=1, device="cpu", total_steps=100, steps_per_epoch=10,
        parameters=1, resumed_step=resumed_step, statistics=[], plain_parameters={},
    )  # fmt: skip


def lost(store: SQLStore, job_id: str) -> list[tuple[int, int]]:
    job = store.get_job(job_id)
    assert job is not None
    return [(one.first_step, one.last_step) for one in job_resource(job).status.progress.lost_steps]


def told(store: SQLStore, job_id: str) -> list[tuple[int, int]]:
    events = [record.data for record in store.events_after(job_id, 0, 100) if record.kind == "steps_lost"]
    return [(data["first_step"], data["last_step"]) for data in events]


def next_attempt(store: SQLStore, claim: Claim) -> Claim:
    assert store.apply(claim, Decision(Phase.RECOVERING, ends_attempt=True), NOW)
    store.release(claim)
    (claim,) = claim_all(store)
    assert store.apply(claim, Decision(Phase.STARTING, action=Action.NEW_ATTEMPT), NOW)
    store.release(claim)
    return claim_all(store)[0]


def test_worker_s_word_of_lost_steps_stays_with_the_job(store: SQLStore) -> None:
    claim = start(store)
    attempt = f"{claim.job.id}-a1"
    words = StepsLost(first_step=4, last_step=6, message="the disk was full")

    store.ingest(attempt, [event(1, started()), steps(2, 1, 2, 3), event(3, words), steps(4, 7, 8)])

    assert lost(store, claim.job.id) == [(4, 6)]
    assert told(store, claim.job.id) == [(4, 6)]  # once, by the worker


@pytest.mark.parametrize(
    "last",
    [
        steps(3, 6, 7),
        event(3, started(resumed_step=5)),
        event(3, Cancelled(step=5)),
        event(3, Done(step=5, metrics={"accuracy": 0.0, "loss": 0.0}, target_step=None, seconds=0.0)),
    ],
    ids=["steps", "started", "cancelled", "done"],
)
def test_steps_that_are_passed_over_are_lost_and_the_job_says_so_for_good(store: SQLStore, last) -> None:
    claim = start(store)
    store.ingest(f"{claim.job.id}-a1", [event(1, started()), steps(2, 1, 2, 3), last])

    assert lost(store, claim.job.id) == [(4, 5)]
    assert told(store, claim.job.id) == [(4, 5)]
    store.apply(claim, Decision(Phase.SUCCEEDED, ends_attempt=True), NOW)
    assert lost(store, claim.job.id) == [(4, 5)]


def test_lost_steps_that_are_done_once_more_are_found(store: SQLStore) -> None:
    claim = start(store)
    store.ingest(f"{claim.job.id}-a1", [event(1, started()), steps(2, 1, 2, 9)])
    assert lost(store, claim.job.id) == [(3, 8)]

    claim = next_attempt(store, claim)
    store.ingest(f"{claim.job.id}-a2", [event(1, started(resumed_step=2)), steps(2, 3, 4), steps(3, 5)])

    assert lost(store, claim.job.id) == [(6, 8)]


def test_late_delivery_is_the_controller_s_alone_and_fills_the_hole(store: SQLStore) -> None:
    claim = start(store)
    first = f"{claim.job.id}-a1"
    store.ingest(first, [event(1, started()), steps(2, 1, 2)])
    claim = next_attempt(store, claim)
    left = [steps(3, 3, 4)]
    with pytest.raises(StaleAttemptError):
        store.ingest(first, left)

    store.ingest(first, left, is_late=True)
    store.ingest(f"{claim.job.id}-a2", [event(1, started(resumed_step=4)), steps(2, 5)])

    assert [
        span.last_step for span in store.spans(claim.job.id, "curves", Wanted(most_steps=100, most_spans=100)).spans
    ] == [1, 2, 3, 4, 5]
    assert lost(store, claim.job.id) == []


def test_late_delivery_is_no_sign_of_life(store: SQLStore) -> None:
    claim = start(store)
    attempt = f"{claim.job.id}-a1"

    store.ingest(attempt, [event(1, started())], is_late=True)

    record = store.get_attempt(attempt)
    assert record is not None
    assert record.state.has_started
    assert record.state.last_seen_at is None


def test_failed_starts_are_counted_in_all_and_in_a_row(store: SQLStore) -> None:
    claim = next_attempt(store, next_attempt(store, start(store)))
    assert (claim.job.state.failed_starts, claim.job.state.failed_starts_in_a_row) == (2, 2)

    store.ingest(f"{claim.job.id}-a3", [event(1, started())])
    claim = next_attempt(store, claim)
    assert (claim.job.state.failed_starts, claim.job.state.failed_starts_in_a_row) == (2, 0)

    claim = next_attempt(store, claim)
    assert (claim.job.state.failed_starts, claim.job.state.failed_starts_in_a_row) == (3, 1)


def test_job_that_waits_for_cpus_holds_no_slot_until_it_waits_no_longer(store: SQLStore) -> None:
    claim = start(store)
    store.release(claim)
    second, third = create(store), create(store)
    assert second.id not in {one.job.id for one in claim_all(store, "a", NOW)}

    store.ingest(f"{claim.job.id}-a1", [event(1, Waiting(message="waiting for 2 CPUs"))])
    taken = claim_all(store, "b", NOW + timedelta(hours=1))

    assert {one.job.id for one in taken} == {claim.job.id, second.id}
    assert third.id not in {one.job.id for one in taken}
    assert remark(taken[0].job.progress) == "waiting for 2 CPUs"
    store.ingest(f"{claim.job.id}-a1", [event(2, Waiting(message=None))])
    assert {one.job.id for one in claim_all(store, "c", NOW + timedelta(hours=2))} == {claim.job.id}


def test_what_an_attempt_waited_for_is_forgotten_with_it(store: SQLStore) -> None:
    claim = start(store)
    store.ingest(f"{claim.job.id}-a1", [event(1, Waiting(message="waiting for 2 CPUs"))])

    assert remark(next_attempt(store, claim).job.progress) is None


def test_workers_that_were_started_again_say_from_where(store: SQLStore) -> None:
    claim = start(store)
    attempt = f"{claim.job.id}-a1"
    store.ingest(attempt, [event(1, started()), steps(2, *range(1, 96)), event(3, started(resumed_step=80))])

    job = store.get_job(claim.job.id)
    assert job is not None
    assert remark(job.progress) == (
        "the workers were started again and go on from the checkpoint of step 80; step 95 was done"
    )
    store.ingest(attempt, [steps(4, *range(81, 96))])
    job = store.get_job(claim.job.id)
    assert job is not None
    assert remark(job.progress) is None
    assert lost(store, claim.job.id) == []


@pytest.mark.parametrize(
    ("kind", "data", "sentence"),
    [
        ("waiting", {"message": "waiting for 2 CPUs"}, "Waiting for 2 CPUs"),
        ("waiting", {"message": None}, "Waiting is over"),
        ("checkpoint_failed", {"step": 1000, "message": "full"}, "Checkpoint of step 1,000 left out: full"),
        ("steps_lost", {"first_step": 4, "last_step": 6, "message": "full"}, "Steps 4 to 6 are lost: full"),
    ],
)
def test_event_is_a_sentence_on_the_page(kind: str, data: dict[str, object], sentence: str) -> None:
    shown = resources.Event(id=1, job_id="job_1", attempt=1, seq=1, kind=kind, time=NOW, data=data)

    assert words(shown) == sentence


@given(ranges, st.sets(st.integers(1, 40)))
def test_ranges_are_sets_of_steps(added: list[tuple[int, int]], removed: set[int]) -> None:
    kept: list[list[int]] = []
    for first, last in added:
        kept = add_range(kept, first, last)
    kept = remove_ranges(kept, sorted(removed))

    wanted = {step for first, last in added for step in range(first, last + 1)} - removed
    assert [step for first, last in kept for step in range(first, last + 1)] == sorted(wanted)
    assert all(one[1] + 1 < following[0] for one, following in pairwise(kept))


def test_gaps_lie_between_the_steps() -> None:
    assert gaps(3, [4, 5, 8, 9, 20]) == [[6, 7], [10, 19]]
    assert gaps(0, [3]) == [[1, 2]]
    assert gaps(9, [4, 5]) == []

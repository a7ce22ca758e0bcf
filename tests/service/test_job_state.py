"""The transition table, row by row, and what holds for every sequence of observations."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngd_service.job_state import (
    ACTIVE,
    TERMINAL,
    TRANSITIONS,
    Action,
    AttemptState,
    Decision,
    Desired,
    JobState,
    Observation,
    Phase,
    Policy,
    Process,
    decide,
)
from ngd_workers.contract.rundir import Outcome

NOW = datetime(2030, 1, 1, tzinfo=UTC)
POLICY = Policy(retry_backoff_s=2, cancel_grace_s=30, interrupt_grace_s=10)
SUCCEEDED = Outcome(result="succeeded", step=9)
HOPELESS = Outcome(result="failed", reason="DataNotFound", message="no data", retryable=False)
UNLUCKY = Outcome(result="failed", reason="WorkerLost", message="lost", retryable=True)
STOPPED = Outcome(result="cancelled", step=4)

GONE = {"process": Process.EXITED}
UP = {"process": Process.RUNNING}
UNSENT = {"is_submitted": False, "has_started": False}
SILENT = {"has_started": False}


def job(phase: Phase, desired: Desired = Desired.RUNNING, **given: object) -> JobState:
    asked = NOW if desired is Desired.CANCELLED else None
    return replace(JobState(phase, desired, max_attempts=3, cancel_requested_at=asked), **given)


def cancelled(phase: Phase, **given: object) -> JobState:
    return job(phase, Desired.CANCELLED, **given)


def attempt(number: int = 1, **given: object) -> AttemptState:
    return replace(AttemptState(number, is_submitted=True, has_started=True), **given)


def seen(**given: object) -> Observation:
    return replace(Observation(now=NOW), **given)


@pytest.mark.parametrize(
    ("state", "live", "observed", "phase", "action"),
    [
        (job(Phase.QUEUED), None, seen(), Phase.STARTING, Action.NEW_ATTEMPT),
        (cancelled(Phase.QUEUED), None, seen(), Phase.CANCELLED, Action.NONE),
        (job(Phase.STARTING), attempt(**UNSENT), seen(), None, Action.SUBMIT),
        (cancelled(Phase.STARTING), attempt(**UNSENT), seen(), Phase.CANCELLED, Action.NONE),
        (job(Phase.STARTING), attempt(**SILENT), seen(**UP), None, Action.NONE),
        (job(Phase.STARTING), attempt(), seen(**UP), Phase.RUNNING, Action.NONE),
        (job(Phase.STARTING), attempt(), seen(**GONE, outcome=SUCCEEDED), Phase.SUCCEEDED, Action.NONE),
        (job(Phase.RUNNING), attempt(), seen(**UP), None, Action.NONE),
        (job(Phase.RUNNING), attempt(), seen(**GONE, outcome=SUCCEEDED), Phase.SUCCEEDED, Action.NONE),
        (job(Phase.RUNNING), attempt(), seen(**GONE, outcome=HOPELESS), Phase.FAILED, Action.NONE),
        (job(Phase.RUNNING), attempt(), seen(**GONE, outcome=UNLUCKY), Phase.RECOVERING, Action.NONE),
        (job(Phase.RUNNING), attempt(), seen(**GONE, outcome=STOPPED), Phase.RECOVERING, Action.NONE),
        (job(Phase.RUNNING), attempt(), seen(**GONE), Phase.RECOVERING, Action.NONE),
        (job(Phase.RUNNING), attempt(), seen(process=Process.UNKNOWN), Phase.RECOVERING, Action.NONE),
        (job(Phase.RUNNING), attempt(3), seen(**GONE), Phase.FAILED, Action.NONE),
        (cancelled(Phase.RUNNING), attempt(), seen(**UP), Phase.CANCELLING, Action.NONE),
        (cancelled(Phase.STARTING), attempt(**SILENT), seen(**UP), Phase.CANCELLING, Action.INTERRUPT),
        (cancelled(Phase.CANCELLING), attempt(), seen(**GONE, outcome=STOPPED), Phase.CANCELLED, Action.NONE),
        (cancelled(Phase.CANCELLING), attempt(), seen(**GONE, outcome=SUCCEEDED), Phase.SUCCEEDED, Action.NONE),
        (cancelled(Phase.CANCELLING), attempt(), seen(**GONE, outcome=HOPELESS), Phase.FAILED, Action.NONE),
        (cancelled(Phase.CANCELLING), attempt(), seen(**GONE), Phase.CANCELLED, Action.NONE),
        (job(Phase.RECOVERING, retry_at=NOW + timedelta(seconds=1)), None, seen(), None, Action.NONE),
        (job(Phase.RECOVERING, retry_at=NOW), None, seen(), Phase.STARTING, Action.NEW_ATTEMPT),
        (cancelled(Phase.RECOVERING), None, seen(), Phase.CANCELLED, Action.NONE),
    ],
)  # fmt: skip
def test_what_follows(
    state: JobState, live: AttemptState | None, observed: Observation, phase: Phase | None, action: Action
) -> None:
    decision = decide(state, live, observed, POLICY)

    assert (decision.phase, decision.action) == (phase, action)


@pytest.mark.parametrize(
    ("state", "live", "observed", "message"),
    [
        (job(Phase.QUEUED), None, seen(), "waiting for the attempt to be handed over"),
        (cancelled(Phase.QUEUED), None, seen(), "cancelled by the user"),
        (job(Phase.STARTING), attempt(**UNSENT), seen(), "the driver is up and starts them"),
        (job(Phase.STARTING), attempt(**SILENT), seen(**UP), "waiting for the workers to report"),
        (job(Phase.STARTING), attempt(**SILENT), seen(**UP, message="no CPU is free"), "no CPU is free"),
        (job(Phase.STARTING), attempt(**SILENT), seen(process=Process.UNREACHABLE, message="no answer"), "no answer"),
        (cancelled(Phase.STARTING), attempt(**SILENT), seen(**UP), "waiting for the workers to stop"),
        (job(Phase.RUNNING), attempt(), seen(**UP, message="a worker restarts"), "a worker restarts"),
        (cancelled(Phase.RUNNING), attempt(), seen(**UP), "waiting for the workers to stop"),
        (job(Phase.RUNNING), attempt(), seen(**GONE, outcome=HOPELESS), "no data"),
        (job(Phase.RUNNING), attempt(), seen(**GONE, outcome=UNLUCKY), "failed: lost; the next one starts in 2 s"),
        (job(Phase.RUNNING), attempt(), seen(**GONE, outcome=STOPPED), "was stopped from outside at step 4"),
        (job(Phase.RUNNING), attempt(3), seen(**GONE), "failure.max_attempts is 3"),
        (job(Phase.RECOVERING, retry_at=NOW), None, seen(), "waiting for the attempt to be handed over"),
        (cancelled(Phase.RECOVERING), None, seen(), "cancelled by the user"),
        (cancelled(Phase.CANCELLING), attempt(), seen(**GONE), "cancelled by the user"),
    ],
)  # fmt: skip
def test_each_phase_says_what_it_waits_for_or_why_it_ended(
    state: JobState, live: AttemptState | None, observed: Observation, message: str
) -> None:
    decision = decide(state, live, observed, POLICY)

    assert message in (decision.message or decision.note or "")


@pytest.mark.parametrize(
    ("live", "observed"),
    [
        (attempt(**UNSENT), seen(message="the quota is full")),
        (attempt(**SILENT), seen(**UP, message="the quota is full")),
        (attempt(**SILENT), seen(process=Process.UNREACHABLE, message="the quota is full")),
    ],
)
def test_job_that_does_not_start_in_its_time_fails_and_says_what_it_waited_for(
    live: AttemptState, observed: Observation
) -> None:
    policy = replace(POLICY, start_within_s=60)
    live = replace(live, created_at=NOW - timedelta(seconds=60))

    late = decide(job(Phase.STARTING), live, observed, policy)
    early = decide(job(Phase.STARTING), live, replace(observed, now=NOW - timedelta(seconds=1)), policy)

    assert (late.phase, late.reason, late.ends_attempt) == (Phase.FAILED, "StartTimeout", True)
    assert "did not report within 60 s; the last that it waited for: the quota is full" in str(late.message)
    assert "NGD_START_WITHIN_S" in str(late.message)
    assert early.phase is None


def test_attempt_that_has_reported_or_ended_is_not_late() -> None:
    policy = replace(POLICY, start_within_s=60)
    old = NOW - timedelta(days=9)

    assert decide(job(Phase.STARTING), attempt(created_at=old), seen(**UP), policy).phase is Phase.RUNNING
    assert decide(job(Phase.RUNNING), attempt(created_at=old), seen(**UP), policy).phase is None
    ended = decide(job(Phase.STARTING), attempt(**SILENT, created_at=old), seen(**GONE, outcome=SUCCEEDED), policy)
    assert ended.phase is Phase.SUCCEEDED


@pytest.mark.parametrize(
    ("sent", "after_s", "action"),
    [
        (attempt(), 29, Action.NONE),
        (attempt(), 30, Action.INTERRUPT),
        (attempt(stop=Action.INTERRUPT, stop_sent_at=NOW + timedelta(seconds=30)), 39, Action.NONE),
        (attempt(stop=Action.INTERRUPT, stop_sent_at=NOW + timedelta(seconds=30)), 40, Action.KILL),
        (attempt(stop=Action.KILL, stop_sent_at=NOW + timedelta(seconds=40)), 50, Action.KILL),
    ],
)
def test_stop_signals_grow_stronger_with_time(sent: AttemptState, after_s: int, action: Action) -> None:
    state = cancelled(Phase.CANCELLING)

    decision = decide(state, sent, seen(**UP, now=NOW + timedelta(seconds=after_s)), POLICY)

    assert (decision.phase, decision.action) == (None, action)


def test_backoff_doubles_up_to_its_limit() -> None:
    assert [POLICY.backoff(number).total_seconds() for number in (1, 2, 3, 9, 1000)] == [2, 4, 8, 300, 300]


@pytest.mark.parametrize(
    ("state", "live", "silent_s", "phase"),
    [
        (job(Phase.RUNNING), attempt(), 599, None),
        (job(Phase.RUNNING), attempt(), 600, Phase.RECOVERING),
        (job(Phase.STARTING), attempt(**UNSENT), 86_400, None),  # nothing runs that could be lost
        (cancelled(Phase.CANCELLING), attempt(**UNSENT), 600, Phase.CANCELLED),
    ],
)
def test_long_silence_ends_what_may_run_and_no_attempt_that_was_never_submitted(
    state: JobState, live: AttemptState, silent_s: int, phase: Phase | None
) -> None:
    silence = seen(process=Process.UNREACHABLE, silent_s=silent_s, message="no answer")

    assert decide(state, live, silence, POLICY).phase == phase


def test_last_failure_says_how_often_and_why() -> None:
    decision = decide(job(Phase.RUNNING), attempt(3), seen(**GONE, outcome=UNLUCKY), POLICY)

    assert decision.reason == "MaxAttemptsExceeded"
    assert decision.message == "attempt 3 failed: lost; failure.max_attempts is 3; the job's log tells more"


def test_attempts_that_never_started_do_not_count_towards_the_jobs_own() -> None:
    unstarted = attempt(7, **SILENT)
    waiting_out = job(Phase.STARTING, failed_starts=6, failed_starts_in_a_row=6)

    decision = decide(waiting_out, unstarted, seen(**GONE, outcome=UNLUCKY), POLICY)

    assert (decision.phase, decision.reason) == (Phase.RECOVERING, "WorkerLost")
    assert decision.message == "attempt 7 failed: lost; 7 in a row, the next one starts in 300 s"
    started = decide(waiting_out, attempt(7), seen(**GONE, outcome=UNLUCKY), POLICY)
    assert started.retry_at == NOW + timedelta(seconds=2)  # the first of its kind


def test_patience_with_starts_has_an_end_that_names_the_last_reason() -> None:
    unstarted = attempt(10, **SILENT)
    waiting_out = job(Phase.STARTING, failed_starts=9, failed_starts_in_a_row=9)

    decision = decide(waiting_out, unstarted, seen(**GONE, outcome=UNLUCKY), POLICY)

    assert (decision.phase, decision.reason) == (Phase.FAILED, "StartFailed")
    assert decision.message == "attempt 10 failed: lost; 10 attempts in a row did not start; the job's log tells more"


def test_start_backoff_outlasts_a_busy_quarter_of_an_hour() -> None:
    waits = [POLICY.start_backoff(number).total_seconds() for number in range(1, POLICY.max_failed_starts)]

    assert waits[:5] == [15, 30, 60, 120, 240]
    assert sum(waits) > 15 * 60


def test_driver_stopped_by_a_signal_from_outside_has_a_reason_of_its_own() -> None:
    stopped = Outcome(result="cancelled", reason="StoppedFromOutside", message="stopped by SIGTERM", step=4)

    decision = decide(job(Phase.RUNNING), attempt(), seen(**GONE, outcome=stopped), POLICY)

    assert (decision.phase, decision.reason) == (Phase.RECOVERING, "StoppedFromOutside")
    assert "stopped from outside at step 4: stopped by SIGTERM" in (decision.message or "")
    assert decide(job(Phase.RUNNING), attempt(), seen(**GONE, outcome=STOPPED), POLICY).reason == "StoppedFromOutside"


outcomes = st.sampled_from([None, SUCCEEDED, HOPELESS, UNLUCKY, STOPPED])
sights = st.builds(
    lambda process, outcome, delay_s, reports: (
        process,
        outcome if process is Process.EXITED else None,
        delay_s,
        reports,
    ),
    st.sampled_from(Process),
    outcomes,
    st.integers(0, 400),
    st.booleans(),
)
Sight = tuple[Process, Outcome | None, int, bool]


class Run:
    """A job under the reconciler's rules, as the store keeps it."""

    def __init__(self) -> None:
        self.job = JobState(Phase.QUEUED, Desired.RUNNING, max_attempts=3)
        self.live: AttemptState | None = None
        self.attempts = 0
        self.started = 0  # attempts whose workers have reported
        self.phases = [Phase.QUEUED]
        self.now = NOW

    def cancel(self) -> None:
        if self.job.phase not in TERMINAL:
            self.job = replace(self.job, desired=Desired.CANCELLED, cancel_requested_at=self.now)

    def look(self, process: Process, outcome: Outcome | None, reports: bool = False) -> Decision:
        if self.live is not None and process is Process.RUNNING and reports and not self.live.has_started:
            self.live = replace(self.live, has_started=True)
            self.started += 1
        decision = decide(self.job, self.live, Observation(self.now, process, outcome), POLICY)
        if decision.ends_attempt and self.live is not None:
            total, in_a_row = self.job.failed_starts, self.job.failed_starts_in_a_row
            after = (total, 0) if self.live.has_started else (total + 1, in_a_row + 1)
            self.job = replace(self.job, failed_starts=after[0], failed_starts_in_a_row=after[1])
            self.live = None
        if decision.phase is not None:
            assert decision.phase in TRANSITIONS[self.job.phase]
            self.job = replace(self.job, phase=decision.phase, retry_at=decision.retry_at)
            self.phases.append(decision.phase)
        if decision.action is Action.NEW_ATTEMPT:
            assert self.live is None
            self.attempts += 1
            self.live = AttemptState(self.attempts, is_submitted=False, has_started=False)
        elif self.live and decision.action is Action.SUBMIT:
            self.live = replace(self.live, is_submitted=True)
        elif self.live and decision.action in (Action.INTERRUPT, Action.KILL):
            self.live = replace(self.live, stop=decision.action, stop_sent_at=self.now)
        return decision


@settings(max_examples=300, deadline=None)
@given(st.lists(sights, max_size=30), st.integers(0, 30))
def test_every_path_is_legal_and_an_end_is_final(path: list[Sight], cancel_at: int) -> None:
    run = Run()
    for index, (process, outcome, delay_s, reports) in enumerate(path):
        run.now += timedelta(seconds=delay_s)
        if index == cancel_at:
            run.cancel()
        had_ended, phases = run.job.phase in TERMINAL, len(run.phases)
        decision = run.look(process, outcome, reports)
        if had_ended:
            assert decision == Decision()
            assert len(run.phases) == phases

    assert run.started <= run.job.max_attempts
    assert run.job.failed_starts_in_a_row <= POLICY.max_failed_starts
    assert (run.live is not None) <= (run.job.phase in ACTIVE)


@settings(max_examples=300, deadline=None)
@given(st.lists(sights, max_size=15))
def test_cancelled_job_always_ends(path: list[Sight]) -> None:
    run = Run()
    for process, outcome, delay_s, reports in path:
        run.now += timedelta(seconds=delay_s)
        run.look(process, outcome, reports)
    run.cancel()

    was_killed = False
    for _ in range(200):
        run.now += timedelta(seconds=1)
        process = Process.EXITED if was_killed else Process.RUNNING
        was_killed |= run.look(process, None).action is Action.KILL

    assert run.job.phase in TERMINAL

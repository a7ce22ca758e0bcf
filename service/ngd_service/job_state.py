"""Pure: the phases of a job, and the one table from observations to decisions.

A user sets the desired state, the reconciler sets the phase by `decide`, workers only add events.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from ngd_workers.contract.rundir import Outcome

__all__ = [
    "ACTIVE",
    "PASSING",
    "TERMINAL",
    "TRANSITIONS",
    "Action",
    "AttemptState",
    "Decision",
    "Desired",
    "JobState",
    "Observation",
    "Phase",
    "Policy",
    "Process",
    "decide",
]


class Phase(StrEnum):
    """The place of a job in its life; TRANSITIONS says which phase may follow."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Desired(StrEnum):
    """The state that the user wants for a job."""

    RUNNING = "RUNNING"
    CANCELLED = "CANCELLED"


class Process(StrEnum):
    """The state of an attempt's process, as far as the dispatcher knows it."""

    UNKNOWN = "unknown"  # never started here
    RUNNING = "running"
    EXITED = "exited"
    UNREACHABLE = "unreachable"  # the dispatcher does not answer: the attempt may live or not


class Action(StrEnum):
    """The reconciler's action after the decision is stored."""

    NONE = "none"
    NEW_ATTEMPT = "new_attempt"
    SUBMIT = "submit"
    INTERRUPT = "interrupt"
    KILL = "kill"


ENDS = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})
TERMINAL = ENDS
ACTIVE = frozenset({Phase.STARTING, Phase.RUNNING, Phase.RECOVERING, Phase.CANCELLING})  # these hold one of the slots
PASSING = ACTIVE - {Phase.RUNNING}  # a job that stays in one of these is stuck

TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.STARTING, Phase.CANCELLED}),
    Phase.STARTING: frozenset({Phase.RUNNING, Phase.RECOVERING, Phase.CANCELLING}) | ENDS,
    Phase.RUNNING: frozenset({Phase.RECOVERING, Phase.CANCELLING}) | ENDS,
    Phase.RECOVERING: frozenset({Phase.STARTING, Phase.CANCELLED}),
    Phase.CANCELLING: ENDS,
    Phase.SUCCEEDED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.CANCELLED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class JobState:
    """The facts of a job on which a decision depends."""

    phase: Phase
    desired: Desired
    max_attempts: int
    cancel_requested_at: datetime | None = None
    retry_at: datetime | None = None
    failed_starts: int = 0  # ended attempts whose workers never reported
    failed_starts_in_a_row: int = 0  # of them, those after the last attempt whose workers did


@dataclass(frozen=True, slots=True)
class AttemptState:
    """The newest attempt, while it has not ended."""

    number: int
    is_submitted: bool
    has_started: bool  # its workers have reported
    stop: Action = Action.NONE  # the strongest signal sent so far
    stop_sent_at: datetime | None = None
    created_at: datetime | None = None
    last_seen_at: datetime | None = None  # its last report, or the last time any controller saw it running


@dataclass(frozen=True, slots=True)
class Observation:
    """The facts about an attempt that the reconciler sees in one tick."""

    now: datetime
    process: Process = Process.UNKNOWN
    outcome: Outcome | None = None
    message: str | None = None  # the dispatcher's own words, for the job's owner
    silent_s: float = 0.0  # when UNREACHABLE: for how long that has been observed


@dataclass(frozen=True, slots=True)
class Policy:
    """The times and limits of the settings that a decision uses, in seconds."""

    retry_backoff_s: float
    cancel_grace_s: float
    interrupt_grace_s: float
    unreachable_s: float = 600.0
    start_within_s: float = 86_400.0
    max_backoff_s: float = 300.0
    max_failed_starts: int = 10
    start_backoff_s: float = 15.0

    def backoff(self, failures: int) -> timedelta:
        """Returns the wait after attempts have died `failures` times."""
        return self._doubled(self.retry_backoff_s, failures)

    def start_backoff(self, failures: int) -> timedelta:
        """Returns the wait after `failures` attempts in a row have not started: the machine may be busy for a while."""
        return self._doubled(self.start_backoff_s, failures)

    def _doubled(self, first_s: float, failures: int) -> timedelta:
        exponent = min(failures - 1, 32)  # a double holds 2**32 times any sensible backoff
        return timedelta(seconds=min(first_s * 2.0**exponent, self.max_backoff_s))


@dataclass(frozen=True, slots=True)
class Decision:
    """The change of a job and its attempt, and the reconciler's next action."""

    phase: Phase | None = None  # None: stays as it is
    reason: str | None = None
    message: str | None = None
    action: Action = Action.NONE
    ends_attempt: bool = False
    retry_at: datetime | None = None
    note: str | None = None  # replaces the message of a job whose phase stays: the reason for waiting


SUBMITTING = "waiting for the attempt to be handed over"
STARTING_WORKERS = "waiting for the workers to report: the driver is up and starts them"
NOTHING = Decision()
CANCELLED_BY_USER = Decision(Phase.CANCELLED, "UserCancelled", "cancelled by the user")


def decide(job: JobState, attempt: AttemptState | None, seen: Observation, policy: Policy) -> Decision:
    """Returns the decision on a job from its state, its live attempt (None: there is none) and the observation.

    A job that waits in QUEUED is put to this question only when it is next and a slot is free.
    """
    if job.phase in TERMINAL:
        return NOTHING
    if attempt is None:
        return _without_attempt(job, seen)
    if _is_overdue(job, attempt, seen, policy):
        return _end(Decision(Phase.FAILED, "StartTimeout", _never_started(seen, policy)))
    if seen.process is Process.UNREACHABLE and seen.outcome is None:
        return _while_silent(job, attempt, seen, policy)
    if seen.process is Process.RUNNING:
        return _while_running(job, attempt, seen, policy)
    if seen.process is Process.UNKNOWN and not attempt.is_submitted:
        if job.desired is Desired.CANCELLED:
            return _end(CANCELLED_BY_USER)
        return Decision(action=Action.SUBMIT, note=STARTING_WORKERS)
    return _after_exit(job, attempt, seen, policy)


def _without_attempt(job: JobState, seen: Observation) -> Decision:
    if job.desired is Desired.CANCELLED:
        return CANCELLED_BY_USER
    if job.retry_at is not None and seen.now < job.retry_at:
        return NOTHING
    return Decision(Phase.STARTING, message=SUBMITTING, action=Action.NEW_ATTEMPT)


def _is_overdue(job: JobState, attempt: AttemptState, seen: Observation, policy: Policy) -> bool:
    """Returns whether the attempt has had its time to start; one that has ended is judged by how it did."""
    may_yet_start = seen.process is not Process.EXITED and seen.outcome is None and job.desired is Desired.RUNNING
    began_at = attempt.created_at
    if job.phase is not Phase.STARTING or attempt.has_started or not may_yet_start or began_at is None:
        return False
    return seen.now >= began_at + timedelta(seconds=policy.start_within_s)


def _never_started(seen: Observation, policy: Policy) -> str:
    return (
        f"the workers did not report within {policy.start_within_s:g} s; the last that it waited for: "
        f"{seen.message or STARTING_WORKERS}; see the job's log, ask for fewer resources, or allow more time with "
        "NGD_START_WITHIN_S"
    )


def _while_running(job: JobState, attempt: AttemptState, seen: Observation, policy: Policy) -> Decision:
    if job.desired is Desired.CANCELLED:
        phase = None if job.phase is Phase.CANCELLING else Phase.CANCELLING
        action = _stop_signal(job, attempt, seen.now, policy)
        return Decision(phase, "UserCancelled", "waiting for the workers to stop", action)
    if job.phase is Phase.STARTING and attempt.has_started:
        return Decision(Phase.RUNNING)
    return Decision(note=seen.message or (STARTING_WORKERS if job.phase is Phase.STARTING else None))


def _while_silent(job: JobState, attempt: AttemptState, seen: Observation, policy: Policy) -> Decision:
    """The attempt may well live on: it is given up when nobody has heard of it for unreachable_s, and fenced.

    One that is not submitted yet has nothing to lose by waiting, and another one would wait just as long.
    """
    patience = timedelta(seconds=policy.unreachable_s)
    was_heard_of = attempt.last_seen_at is not None and seen.now < attempt.last_seen_at + patience
    may_have_begun = attempt.is_submitted or attempt.has_started or job.desired is Desired.CANCELLED
    if seen.silent_s >= policy.unreachable_s and may_have_begun and not was_heard_of:
        return _after_exit(job, attempt, seen, policy)
    if job.desired is Desired.CANCELLED and job.phase is not Phase.CANCELLING:
        return Decision(Phase.CANCELLING, "UserCancelled", seen.message)
    return Decision(note=seen.message)


def _stop_signal(job: JobState, attempt: AttemptState, now: datetime, policy: Policy) -> Action:
    """Returns the next rung of the ladder: the workers' own stop, then SIGINT, then SIGKILL."""
    if attempt.stop is Action.NONE:
        asked_at = job.cancel_requested_at or now
        has_had_grace = now >= asked_at + timedelta(seconds=policy.cancel_grace_s)
        # Before they report, the workers can't be told that the job is cancelled: waiting would be in vain.
        return Action.INTERRUPT if has_had_grace or not attempt.has_started else Action.NONE
    sent_at = attempt.stop_sent_at or now
    return Action.KILL if now >= sent_at + timedelta(seconds=policy.interrupt_grace_s) else Action.NONE


def _after_exit(job: JobState, attempt: AttemptState, seen: Observation, policy: Policy) -> Decision:
    outcome = seen.outcome
    if outcome is not None and outcome.result == "succeeded":
        return _end(Decision(Phase.SUCCEEDED))
    if outcome is not None and outcome.result == "failed" and not outcome.retryable:
        return _end(Decision(Phase.FAILED, outcome.reason or "WorkerFailed", outcome.message))
    if job.desired is Desired.CANCELLED:
        return _end(CANCELLED_BY_USER)
    what, reason = _what_happened(attempt, seen), _reason(seen)
    limit, failures, backoff = _ring(job, attempt, policy)
    if limit is not None:
        exceeded = "MaxAttemptsExceeded" if attempt.has_started else "StartFailed"
        return _end(Decision(Phase.FAILED, exceeded, f"{what}; {limit}; the job's log tells more"))
    again = f"the next one starts in {backoff.total_seconds():g} s"
    message = f"{what}; {again}" if attempt.has_started else f"{what}; {failures} in a row, {again}"
    return _end(Decision(Phase.RECOVERING, reason, message, retry_at=seen.now + backoff))


def _ring(job: JobState, attempt: AttemptState, policy: Policy) -> tuple[str | None, int, timedelta]:
    """Returns which limit is reached, if one is, how many failures count towards it, and the wait before the next.

    An attempt whose workers never reported says nothing of the job: the machine was busy, or its cluster. The job's own
    attempts are those whose workers did.
    """
    if attempt.has_started:
        failures = attempt.number - job.failed_starts
        limit = f"failure.max_attempts is {job.max_attempts}" if failures >= job.max_attempts else None
        return limit, failures, policy.backoff(failures)
    failures = job.failed_starts_in_a_row + 1
    limit = f"{failures} attempts in a row did not start" if failures >= policy.max_failed_starts else None
    return limit, failures, policy.start_backoff(failures)


def _reason(seen: Observation) -> str:
    if seen.outcome is not None:
        return seen.outcome.reason or ("StoppedFromOutside" if seen.outcome.result == "cancelled" else "DriverLost")
    return "ClusterUnreachable" if seen.process is Process.UNREACHABLE else "DriverLost"


def _what_happened(attempt: AttemptState, seen: Observation) -> str:
    outcome = seen.outcome
    if outcome is None:
        what = "is given up" if seen.process is Process.UNREACHABLE else "died without a result"
        if not attempt.has_started:
            what += " before its workers had started"
        return f"attempt {attempt.number} {what}" + (f": {seen.message}" if seen.message else "")
    if outcome.result == "cancelled":
        by = f": {outcome.message}" if outcome.message else ""
        return f"attempt {attempt.number} was stopped from outside at step {outcome.step}{by}"
    return f"attempt {attempt.number} failed: {outcome.message}"


def _end(decision: Decision) -> Decision:
    return Decision(decision.phase, decision.reason, decision.message, ends_attempt=True, retry_at=decision.retry_at)

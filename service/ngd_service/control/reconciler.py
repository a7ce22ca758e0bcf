"""Makes phase follow desired: claim, observe, decide, apply, act. The only writer of phases.

Slow work lies outside transactions; what is stored is guarded by the lease; what is done can be done twice. So the
controller may die between any two lines, and the next one goes on from there.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from ulid import ULID

from ngd_service.dispatchers.base import (
    AttemptRef,
    BackendError,
    BackendFullError,
    BackendRefusedError,
    BackendUnavailableError,
    Dispatcher,
    DispatchError,
    Launch,
)
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.dispatchers.unresponsive import Silence
from ngd_service.errors import StoreUnavailableError
from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Action, Decision, Observation, Phase, Policy, Process, decide
from ngd_service.monitoring.metrics import ControllerMetrics
from ngd_service.store.base import Claim, Store
from ngd_service.store.progress import remark
from ngd_workers.contract.rundir import Outcome

__all__ = ["Reconciler"]

log = logging.getLogger(__name__)

NOTED = (
    Phase.STARTING,
    Phase.RUNNING,
)  # their message gives the reason for waiting
RESULTS: dict[Phase | None, str] = {Phase.SUCCEEDED: "succeeded", Phase.CANCELLED: "cancelled"}
STOP_S = 4.0  # a tick may hang on a call; the next controller repeats work that is half done


class Reconciler:
    """Looks after all jobs, once per tick_s and whenever it is woken."""

    def __init__(
        self,
        *,
        store: Store,
        dispatcher: Dispatcher[Any],
        files: AttemptFiles,
        token_of: Callable[[str], str],
        policy: Policy,
        max_running_jobs: int,
        tick_s: float,
        lease_s: float,
        max_log_bytes: int,
        failpoint: Failpoint,
        metrics: ControllerMetrics,
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._files = files
        self._silence = Silence()
        self._outage: BackendUnavailableError | None = None  # in this tick: one call has waited, the others need not
        self._turn = 0
        self._token_of = token_of
        self._policy = policy
        self._max_running_jobs = max_running_jobs
        self._tick_s = tick_s
        self._lease_s = lease_s
        self._max_log_bytes = max_log_bytes
        self._failpoint = failpoint
        self._metrics = metrics
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self._ticked_at = time.monotonic()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the tick in progress, unless that takes too long; running jobs go on."""
        self._stopping.set()
        self._woken.set()
        self._thread.join(STOP_S)

    def wake(self) -> None:
        """Lets the next tick begin now."""
        self._woken.set()

    @property
    def tick_age_s(self) -> float:
        """Seconds since the last tick that came to its end."""
        return time.monotonic() - self._ticked_at

    def _run(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self.tick()
                self._ticked_at = time.monotonic()
                self._metrics.ticked(self._ticked_at - began)
            except StoreUnavailableError as error:
                log.error("tick_failed error=%s", error)
            except Exception:  # the boundary of this thread: the next tick tries again
                log.exception("tick_failed")
            self._woken.wait(self._tick_s)
            self._woken.clear()

    def tick(self) -> None:
        """Looks once at each job that may need something."""
        claims = self._store.claim(
            lease_token=str(ULID()), now=datetime.now(UTC), lease_s=self._lease_s, max_running=self._max_running_jobs
        )
        self._outage = None
        self._end_what_was_left()
        for claim in self._in_turn(claims):
            try:
                self._reconcile(claim)
            except StoreUnavailableError:
                raise
            except BackendError as error:  # nothing was stored: the next tick goes the same way
                log.warning("not_reconciled job_id=%s error=%s", claim.job.id, error)
                self._note(claim, str(error))
            except Exception:  # one job's trouble must not keep the others waiting
                log.exception("reconcile_failed job_id=%s", claim.job.id)
            finally:
                self._store.release(claim)

    def _in_turn(self, claims: list[Claim]) -> list[Claim]:
        """Begins with another job each tick: one whose call takes all the time must not hide the others for ever."""
        self._turn += 1
        first = self._turn % max(len(claims), 1)
        return claims[first:] + claims[:first]

    def _reconcile(self, claim: Claim) -> None:
        ref = AttemptRef(claim.job.id, claim.job.attempt)
        seen = self._observe(ref, claim)
        decision = self._decide(claim, seen)
        if decision.phase is None and decision.action is Action.NONE:
            self._note(claim, decision.note)
            return
        # What was seen may have taken longer than the lease: then the job is another controller's by now.
        if not self._store.renew(claim, datetime.now(UTC), self._lease_s):
            return
        is_left_running = False
        if decision.ends_attempt and claim.attempt is not None:
            is_left_running = not self._settle(ref)
            seen, decision = self._look_again(ref, claim, seen)
        if decision.phase is not None and not self._apply(claim, decision, seen.outcome, is_left_running):
            return
        refusal = self._act(ref, claim, decision)
        if decision.phase is None:
            self._note(claim, refusal or decision.note)

    def _decide(self, claim: Claim, seen: Observation) -> Decision:
        return decide(claim.job.state, claim.attempt.state if claim.attempt else None, seen, self._policy)

    def _look_again(self, ref: AttemptRef, claim: Claim, seen: Observation) -> tuple[Observation, Decision]:
        """While the attempt was being ended its outcome may have come into sight, or that its workers had reported."""
        assert claim.attempt is not None
        outcome = None if seen.outcome else self._files.outcome(ref)
        if outcome is not None:
            seen = replace(seen, now=datetime.now(UTC), process=Process.EXITED, outcome=outcome)
        return seen, self._decide(replace(claim, attempt=self._store.get_attempt(claim.attempt.id)), seen)

    def _note(self, claim: Claim, message: str | None) -> None:
        """Sets the reason for waiting as the job's message, unless the message explains the phase."""
        if message != claim.job.message and claim.job.state.phase in NOTED:
            self._store.note(claim, message)

    def _observe(self, ref: AttemptRef, claim: Claim) -> Observation:
        now = datetime.now(UTC)
        if claim.attempt is None:
            return Observation(now)
        try:
            if self._outage is not None:
                raise self._outage
            seen = self._dispatcher.inspect(ref)
        except BackendError as error:
            self._note_trouble("inspect", error)
            silent_s = self._silence.failed(ref)
            if silent_s == 0:
                log.warning("backend_unavailable attempt=%s error=%s", ref.attempt_id, error)
            return Observation(now, Process.UNREACHABLE, self._outcome_in_sight(ref), str(error), silent_s)
        self._metrics.dispatcher_answered("inspect", is_up=True)
        if self._silence.is_over(ref):
            log.info("backend_answers attempt=%s", ref.attempt_id)
        message = seen.message
        if seen.process is Process.RUNNING:
            self._note_life(claim, now)
            self._files.bound_logs(ref, self._max_log_bytes)
            message = message or remark(claim.job.progress)
        elif seen.process is Process.UNKNOWN and not claim.attempt.state.is_submitted:
            message = claim.job.message  # why the last submission was refused
        return Observation(now, seen.process, seen.outcome, message)

    def _outcome_in_sight(self, ref: AttemptRef) -> Outcome | None:
        try:
            return self._files.outcome(ref)
        except BackendRefusedError:
            return None

    def _note_life(self, claim: Claim, now: datetime) -> None:
        """Lets the other controllers know that the attempt runs, a few times within their patience with silence."""
        state = claim.attempt.state if claim.attempt else None
        assert state is not None
        if not state.is_submitted:
            self._store.mark_submitted(claim)  # the controller that submitted it did not live to say so
        between = timedelta(seconds=self._policy.unreachable_s / 10)
        if state.last_seen_at is None or now >= state.last_seen_at + between:
            self._store.mark_seen(claim, now)

    def _note_trouble(self, call: str, error: BackendError) -> None:
        if isinstance(error, BackendUnavailableError):
            self._outage = error
        self._metrics.dispatcher_answered(call, is_up=isinstance(error, BackendFullError))

    def _settle(self, ref: AttemptRef) -> bool:
        """Ends the attempt's remaining processes, and takes in events that no controller was up to receive.

        In this order: the fence, so that no checkpoint is committed whose steps are told to nobody; the processes; then
        what they have written. Returns whether it could be ended; if not it is tried again later.
        """
        self._silence.is_over(ref)
        self._files.fence(ref)
        try:
            self._dispatcher.kill(ref)
            is_ended = True
        except BackendError as error:
            self._note_trouble("kill", error)
            log.warning("not_ended attempt=%s error=%s", ref.attempt_id, error)
            is_ended = False
        self._drain(ref)
        return is_ended

    def _drain(self, ref: AttemptRef) -> None:
        """Takes in events that the attempt has spooled and not delivered."""
        attempt = self._store.get_attempt(ref.attempt_id)
        if attempt is None:
            return
        for events in self._files.undelivered(ref, attempt.acknowledged_seq):
            self._metrics.events_ingested(self._store.ingest(attempt.id, events, is_late=True).new_events)

    def _end_what_was_left(self) -> None:
        """Ends the attempts that were given up while nobody could end them."""
        for attempt in self._store.left_running():
            ref = AttemptRef(attempt.job_id, attempt.state.number)
            try:
                self._dispatcher.kill(ref)
                if self._dispatcher.inspect(ref).process is Process.RUNNING:
                    continue  # it takes its time
            except BackendUnavailableError as error:
                self._note_trouble("kill", error)
                return
            except BackendRefusedError as error:
                self._note_trouble("kill", error)
                log.warning("not_ended attempt=%s error=%s", ref.attempt_id, error)
                continue
            self._store.mark_gone(attempt.id)
            log.info("ended_late attempt=%s", ref.attempt_id)

    def _apply(self, claim: Claim, decision: Decision, outcome: Outcome | None, is_left_running: bool = False) -> bool:
        is_stored = self._store.apply(claim, decision, datetime.now(UTC), outcome, is_left_running=is_left_running)
        log.info(
            "phase job_id=%s from=%s to=%s reason=%s stored=%s",
            claim.job.id,
            claim.job.state.phase,
            decision.phase,
            decision.reason,
            is_stored,
        )
        if is_stored:
            self._count(decision, outcome)
        self.wake()
        return is_stored

    def _count(self, decision: Decision, outcome: Outcome | None) -> None:
        if decision.action is Action.NEW_ATTEMPT:
            self._metrics.attempt_started()
        if decision.ends_attempt:
            result = RESULTS.get(decision.phase, "failed")
            is_lost = result == "failed" and outcome is None and decision.reason != "DispatchFailed"
            self._metrics.attempt_ended("lost" if is_lost else result)

    def _act(self, ref: AttemptRef, claim: Claim, decision: Decision) -> str | None:
        """Carries the decision out. Returns the reason if that failed."""
        try:
            self._do(ref, claim, decision)
        except DispatchError as error:
            self._apply(claim, Decision(Phase.FAILED, "DispatchFailed", str(error), ends_attempt=True), None)
            return str(error)
        except BackendError as error:
            self._note_trouble(decision.action, error)
            log.warning("not_done attempt=%s action=%s error=%s", ref.attempt_id, decision.action, error)
            return str(error)
        else:
            self._metrics.dispatcher_answered(decision.action, is_up=True)
        return None

    def _do(self, ref: AttemptRef, claim: Claim, decision: Decision) -> None:
        match decision.action:
            case Action.NEW_ATTEMPT:
                # The next tick submits it: after a crash right here the same code goes the same way.
                self._failpoint.reach("after_attempt_commit")
            case Action.SUBMIT:
                if ref.number > 1:  # it may have been given up while nobody could end it, and have gone on writing
                    before = AttemptRef(ref.job_id, ref.number - 1)
                    self._dispatcher.kill(before)
                    self._drain(before)
                self._dispatcher.submit(Launch(ref, claim.job.spec, self._token_of(ref.attempt_id)))
                self._failpoint.reach("after_submit")
                self._store.mark_submitted(claim)
            case Action.INTERRUPT:
                self._dispatcher.interrupt(ref)
                self._store.mark_stopped(claim, Action.INTERRUPT, datetime.now(UTC))
            case Action.KILL:
                self._dispatcher.kill(ref)
                self._store.mark_stopped(claim, Action.KILL, datetime.now(UTC))

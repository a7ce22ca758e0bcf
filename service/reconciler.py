"""Makes phase follow desired: claim, observe, decide, apply, act. The only writer of phases.

Slow work lies outside transactions; what is stored is guarded by the lease; what is done can be done twice. So the
controller may die between any two lines, and the next one goes on from there.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from ulid import ULID

from service.dispatchers.base import AttemptRef, BackendUnavailableError, Dispatcher, DispatchError, Launch
from service.dispatchers.files import AttemptFiles
from service.errors import StoreUnavailableError
from service.failpoint import Failpoint
from service.job_state import Action, Decision, Observation, Phase, Policy, Process, decide
from service.metrics import ControllerMetrics
from service.store.base import Claim, Store
from workers.rundir import Outcome

__all__ = ["Reconciler"]

log = logging.getLogger(__name__)

NOTED = (Phase.STARTING, Phase.RUNNING)  # their message says what they wait for; elsewhere it says why they are there
RESULTS: dict[Phase | None, str] = {Phase.SUCCEEDED: "succeeded", Phase.CANCELLED: "cancelled"}
STOP_S = 4.0  # a tick may hang on a call; what it leaves half done the next controller does again


class Reconciler:
    """Looks after all jobs, once per tick_s and whenever it is woken."""

    def __init__(
        self,
        *,
        store: Store,
        dispatcher: Dispatcher,
        files: AttemptFiles,
        token_of: Callable[[str], str],
        policy: Policy,
        max_running_jobs: int,
        tick_s: float,
        lease_s: float,
        failpoint: Failpoint,
        metrics: ControllerMetrics,
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._files = files
        self._silent_since: dict[AttemptRef, datetime] = {}  # of attempts whose backend does not answer
        self._outage: BackendUnavailableError | None = None  # in this tick: one call has waited, the others need not
        self._token_of = token_of
        self._policy = policy
        self._max_running_jobs = max_running_jobs
        self._tick_s = tick_s
        self._lease_s = lease_s
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
        for claim in claims:
            try:
                self._reconcile(claim)
            except StoreUnavailableError:
                raise
            except Exception:  # one job's trouble must not keep the others waiting
                log.exception("reconcile_failed job_id=%s", claim.job.id)
            finally:
                self._store.release(claim)

    def _reconcile(self, claim: Claim) -> None:
        ref = AttemptRef(claim.job.id, claim.job.attempt)
        seen = self._observe(ref, claim)
        attempt = claim.attempt.state if claim.attempt else None
        decision = decide(claim.job.state, attempt, seen, self._policy)
        if decision.ends_attempt:
            self._settle(ref, claim)
        if decision.phase is not None and not self._apply(claim, decision, seen.outcome):
            return
        if decision.phase is None and decision.note != claim.job.message and claim.job.state.phase in NOTED:
            self._store.note(claim, decision.note)
        try:
            self._act(ref, claim, decision)
        except DispatchError as error:
            self._apply(claim, Decision(Phase.FAILED, "DispatchFailed", str(error), ends_attempt=True), seen.outcome)
        except BackendUnavailableError as error:
            self._note_outage(error)
            log.warning("backend_unavailable attempt=%s action=%s error=%s", ref.attempt_id, decision.action, error)

    def _observe(self, ref: AttemptRef, claim: Claim) -> Observation:
        now = datetime.now(UTC)
        if claim.attempt is None:
            return Observation(now)
        try:
            if self._outage is not None:
                raise self._outage
            seen = self._dispatcher.inspect(ref)
        except BackendUnavailableError as error:
            self._note_outage(error)
            if ref not in self._silent_since:
                self._silent_since[ref] = now
                log.warning("backend_unavailable attempt=%s error=%s", ref.attempt_id, error)
            return Observation(now, Process.UNREACHABLE, self._files.outcome(ref), str(error), self._silent_since[ref])
        self._metrics.dispatcher_answered(is_up=True)
        if self._silent_since.pop(ref, None):
            log.info("backend_answers attempt=%s", ref.attempt_id)
        return Observation(now, seen.process, seen.outcome, seen.message)

    def _note_outage(self, error: BackendUnavailableError) -> None:
        self._outage = error
        self._metrics.dispatcher_answered(is_up=False)

    def _settle(self, ref: AttemptRef, claim: Claim) -> None:
        """Ends what the attempt left running, and takes in what it could not deliver while no controller was up."""
        if claim.attempt is None:
            return
        self._silent_since.pop(ref, None)
        try:
            self._dispatcher.kill(ref)
        except BackendUnavailableError as error:  # the next attempt kills it before it starts, and fences it
            self._note_outage(error)
            log.warning("not_killed attempt=%s error=%s", ref.attempt_id, error)
        for events in self._files.undelivered(ref, claim.attempt.acknowledged_seq):
            self._metrics.events_ingested(self._store.ingest(claim.attempt.id, events).new_events)

    def _apply(self, claim: Claim, decision: Decision, outcome: Outcome | None) -> bool:
        is_stored = self._store.apply(claim, decision, datetime.now(UTC), outcome)
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

    def _act(self, ref: AttemptRef, claim: Claim, decision: Decision) -> None:
        match decision.action:
            case Action.NEW_ATTEMPT:
                # The next tick submits it: after a crash right here the same code goes the same way.
                self._failpoint.reach("after_attempt_commit")
            case Action.SUBMIT:
                if ref.number > 1:  # it may have been given up while nobody could end it
                    self._dispatcher.kill(AttemptRef(ref.job_id, ref.number - 1))
                self._dispatcher.submit(Launch(ref, claim.job.spec, self._token_of(ref.attempt_id)))
                self._failpoint.reach("after_submit")
                self._store.mark_submitted(claim)
            case Action.INTERRUPT:
                self._dispatcher.interrupt(ref)
                self._store.mark_stopped(claim, Action.INTERRUPT, datetime.now(UTC))
            case Action.KILL:
                self._dispatcher.kill(ref)
                self._store.mark_stopped(claim, Action.KILL, datetime.now(UTC))

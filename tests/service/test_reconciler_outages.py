"""What the reconciler makes of a backend that does not answer, or refuses: a real store, a backend made to fail."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from ngd_service.control.reconciler import Reconciler
from ngd_service.dispatchers.base import (
    AttemptRef,
    BackendFullError,
    BackendRefusedError,
    BackendUnavailableError,
    Launch,
    Seen,
)
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.dispatchers.unresponsive import LONGEST_GAP_S, Silence
from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Phase, Policy, Process
from ngd_service.monitoring import metrics
from ngd_service.monitoring.metrics import ControllerMetrics
from ngd_service.store import tables as t
from ngd_service.store.spans import Wanted
from ngd_service.store.sql import SQLStore
from ngd_workers.contract.events import Numbered, Started, Steps
from ngd_workers.contract.rundir import Outcome, write_json
from ngd_workers.report.spool import Spool
from tests.support.attempts import small_spec
from tests.support.fault_driver import step_record
from tests.support.faulty_files import ERRORS, Faults

PATIENCE_S = 100.0


POLICY = Policy(retry_backoff_s=0, cancel_grace_s=0, interrupt_grace_s=0, unreachable_s=PATIENCE_S, start_backoff_s=0)


@dataclass
class Backend:
    """A dispatcher whose attempts live until they are killed."""

    running: set[AttemptRef] = field(default_factory=set)
    is_away: bool = False
    refuses: Callable[[str, AttemptRef], bool] = lambda _call, _ref: False
    calls: list[tuple[str, AttemptRef]] = field(default_factory=list)
    on_kill: Callable[[AttemptRef], None] = lambda _ref: None
    refusal: type[BackendRefusedError] = BackendRefusedError

    def submit(self, launch: Launch) -> None:
        self._call("submit", launch.ref)
        self.running.add(launch.ref)

    def inspect(self, ref: AttemptRef) -> Seen:
        self._call("inspect", ref)
        return Seen(Process.RUNNING if ref in self.running else Process.UNKNOWN)

    def interrupt(self, ref: AttemptRef) -> None:
        self._call("interrupt", ref)

    def kill(self, ref: AttemptRef) -> None:
        self.on_kill(ref)
        self._call("kill", ref)
        self.running.discard(ref)

    def of(self, call: str) -> list[AttemptRef]:
        return [ref for name, ref in self.calls if name == call]

    def _call(self, name: str, ref: AttemptRef) -> None:
        self.calls.append((name, ref))
        if self.is_away:
            raise BackendUnavailableError("the backend does not answer")
        if self.refuses(name, ref):
            raise self.refusal(f"the backend could not {name}")


class Controller:
    """A reconciler on the store, whose patience runs on a clock of the test."""

    def __init__(self, store: SQLStore, backend: Backend, runs_dir: Path) -> None:
        self.store, self.backend = store, backend
        self.now_s = 0.0
        self.files = AttemptFiles(runs_dir=runs_dir, data_dir=None, worker_url="http://127.0.0.1:1", cluster="given")
        self.metrics = ControllerMetrics("0")
        self.reconciler = Reconciler(
            store=store,
            dispatcher=backend,
            files=self.files,
            token_of=lambda attempt_id: "token",
            policy=POLICY,
            max_running_jobs=10,
            tick_s=1,
            max_log_bytes=1 << 30,
            lease_s=30,
            failpoint=Failpoint(None),
            metrics=self.metrics,
        )
        self.reconciler._silence = Silence(lambda: self.now_s)

    def ticks(self, number: int = 1, after_s: float = 0.0) -> None:
        for _ in range(number):
            self.now_s += after_s
            self.reconciler.tick()

    @property
    def is_served(self) -> bool:
        """What Prometheus is told of the backend."""
        return b"\nngd_dispatcher_up 1.0\n" in self.metrics.exposition(None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLStore]:
    store = SQLStore(f"sqlite:///{tmp_path / 'store.sqlite'}")
    yield store
    store.close()


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def controller(store: SQLStore, backend: Backend, tmp_path: Path) -> Controller:
    return Controller(store, backend, tmp_path)


def post(store: SQLStore, job_id: str, max_attempts: int = 3) -> AttemptRef:
    spec = small_spec(failure={"max_attempts": max_attempts}).model_dump(mode="json")
    store.create_job(job_id, "small", spec, datetime.now(UTC))
    return AttemptRef(job_id, 1)


def report(store: SQLStore, ref: AttemptRef) -> None:
    started = Started(
        spec={},
        seed=0,
        commit=None,
        versions={},
        world_size=1,
        device="cpu",
        total_steps=1,
        steps_per_epoch=1,
        parameters=1,
        resumed_step=0,
        statistics=[],
        plain_parameters={},
    )
    store.ingest(ref.attempt_id, [Numbered(seq=1, time_s=0.0, event=started)])


def forget_when_it_was_seen(store: SQLStore) -> None:
    """As if the last sign of every attempt were older than anybody's patience."""
    long_ago = datetime.now(UTC) - timedelta(seconds=2 * PATIENCE_S)
    with store._writers.begin() as connection:
        connection.execute(sa.update(t.attempts).values(last_seen_at=long_ago))


def phase(store: SQLStore, ref: AttemptRef) -> tuple[Phase, int]:
    job = store.get_job(ref.job_id)
    assert job is not None
    return job.state.phase, job.attempt


def test_one_refused_call_leaves_the_other_jobs_alone(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    refused, *others = (post(store, name) for name in ("job_1", "job_2", "job_3"))
    backend.refuses = lambda call, ref: call == "submit" and ref == refused

    controller.ticks(12, after_s=PATIENCE_S / 4)

    assert backend.running == set(others)
    assert [phase(store, ref) for ref in others] == [(Phase.STARTING, 1)] * 2
    job = store.get_job("job_1")
    assert job is not None
    assert (job.state.phase, job.message) == (Phase.STARTING, "the backend could not submit")


def test_silence_that_nobody_observed_does_not_count(store: SQLStore, backend: Backend, controller: Controller) -> None:
    ref = post(store, "job_1")
    controller.ticks(3)
    backend.is_away = True
    forget_when_it_was_seen(store)

    controller.ticks()
    controller.ticks(after_s=1000 * PATIENCE_S)  # this machine was suspended, or its database away

    assert LONGEST_GAP_S < PATIENCE_S
    assert phase(store, ref) == (Phase.STARTING, 1)


def test_silent_attempt_is_given_up_and_ended_once_the_backend_is_back(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    ref = post(store, "job_1", max_attempts=1)
    controller.ticks(3)
    report(store, ref)
    backend.is_away = True
    forget_when_it_was_seen(store)
    controller.ticks(10, after_s=PATIENCE_S / 4)
    assert phase(store, ref) == (Phase.FAILED, 1)
    assert backend.running == {ref}

    backend.is_away = False
    controller.ticks(2)

    assert backend.running == set()
    killed = len(backend.of("kill"))
    controller.ticks(2)
    assert len(backend.of("kill")) == killed


def test_attempt_that_reports_is_not_given_up(store: SQLStore, backend: Backend, controller: Controller) -> None:
    ref = post(store, "job_1")
    controller.ticks(3)
    backend.is_away = True
    forget_when_it_was_seen(store)
    report(store, ref)

    controller.ticks(10, after_s=PATIENCE_S / 4)

    assert phase(store, ref)[1] == 1
    assert backend.of("kill") == []


def test_attempt_that_another_controller_sees_is_not_given_up(
    store: SQLStore, backend: Backend, controller: Controller, tmp_path: Path
) -> None:
    cut_off = Controller(store, Backend(is_away=True), tmp_path)
    ref = post(store, "job_1")
    controller.ticks(3)

    cut_off.ticks(10, after_s=PATIENCE_S / 4)

    assert phase(store, ref) == (Phase.STARTING, 1)
    assert backend.running == {ref}


def test_attempt_whose_submission_was_not_noted_is_given_up_too(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    ref = post(store, "job_1")
    controller.ticks(3)
    with store._writers.begin() as connection:  # the controller died between the two
        connection.execute(sa.update(t.attempts).values(is_submitted=False))
    controller.ticks()
    backend.is_away = True
    forget_when_it_was_seen(store)

    controller.ticks(10, after_s=PATIENCE_S / 4)

    assert phase(store, ref) == (Phase.STARTING, 2)
    reasons = [event.data.get("reason") for event in store.events_after("job_1", 0, 100) if event.kind == "phase"]
    assert "ClusterUnreachable" in reasons


def test_outcome_that_comes_into_sight_while_the_attempt_is_ended_counts(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    ref = post(store, "job_1", max_attempts=1)
    controller.ticks(3)
    backend.running.clear()  # its job is gone, and no outcome is seen yet
    late = Outcome(result="succeeded", step=7)
    backend.on_kill = lambda killed: write_json(controller.files.folder(killed).outcome, late)
    controller.files.folder(ref).path.mkdir(parents=True)

    controller.ticks()

    assert phase(store, ref) == (Phase.SUCCEEDED, 1)


def test_controller_whose_lease_ran_out_while_it_looked_does_nothing(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    ref = post(store, "job_1")
    controller.ticks(1)

    def lose_the_lease(call: str, asked: AttemptRef) -> bool:
        if call == "inspect":
            with store._writers.begin() as connection:
                connection.execute(sa.update(t.jobs).values(lease_token="another controller's"))
        return False

    backend.refuses = lose_the_lease
    controller.ticks()

    assert backend.of("submit") == []
    assert phase(store, ref) == (Phase.STARTING, 1)


def test_stop_that_can_not_be_written_is_logged_and_no_error(
    controller: Controller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "job_1").write_text("a file where a folder should be")

    controller.files.ask_to_stop(AttemptRef("job_1", 1))

    assert "not_written" in caplog.text


def test_refusal_to_end_one_of_the_given_up_leaves_the_others_to_be_ended(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    stays, goes = (post(store, name, max_attempts=1) for name in ("job_1", "job_2"))
    controller.ticks(3)
    for ref in (stays, goes):
        report(store, ref)
    backend.is_away = True
    forget_when_it_was_seen(store)
    controller.ticks(10, after_s=PATIENCE_S / 4)
    assert backend.running == {stays, goes}

    backend.is_away = False
    backend.refuses = lambda call, ref: call == "kill" and ref == stays
    controller.ticks(2)

    assert backend.running == {stays}


def test_jobs_take_turns_in_being_the_first(store: SQLStore, backend: Backend, controller: Controller) -> None:
    refs = {post(store, name) for name in ("job_1", "job_2", "job_3")}
    controller.ticks(3)
    backend.is_away = True
    backend.calls.clear()

    controller.ticks(3)

    assert {ref for _, ref in backend.calls} == refs
    assert len(backend.calls) == 3


@pytest.mark.parametrize("call", ["submit", "kill"])
def test_backend_that_never_does_what_it_is_asked_is_down(
    store: SQLStore, backend: Backend, controller: Controller, call: str
) -> None:
    fine, refused = (post(store, name, max_attempts=1) for name in ("job_1", "job_2"))
    controller.ticks(1)
    backend.refuses = lambda asked, ref: asked == call and ref == refused
    if call == "kill":
        controller.ticks(2)
        store.request_cancel(refused.job_id, datetime.now(UTC))

    controller.ticks(4)
    assert not controller.is_served
    backend.refuses = lambda _call, _ref: False
    controller.ticks(1)

    assert controller.is_served
    assert fine in backend.running


def test_backend_that_has_no_room_is_not_down(store: SQLStore, backend: Backend, controller: Controller) -> None:
    ref = post(store, "job_1")
    backend.refusal, backend.refuses = BackendFullError, lambda call, _ref: call == "submit"

    controller.ticks(3)

    assert controller.is_served
    assert phase(store, ref) == (Phase.STARTING, 1)


def test_backend_that_nobody_asks_any_more_is_not_down(
    store: SQLStore, backend: Backend, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = post(store, "job_1")
    backend.refuses = lambda call, _ref: call == "submit"
    controller.ticks(3)
    assert not controller.is_served

    store.request_cancel(ref.job_id, datetime.now(UTC))
    controller.ticks(2)

    assert phase(store, ref) == (Phase.CANCELLED, 1)
    monkeypatch.setattr(metrics, "FAILED_FOR_S", 0.0)  # a minute later
    assert controller.is_served


@pytest.mark.parametrize("file", ["outcome", "spool"])
def test_job_that_has_ended_is_not_run_again_while_its_files_can_not_be_read(
    store: SQLStore, backend: Backend, controller: Controller, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    ref = post(store, "job_1")
    controller.ticks(3)
    folder = controller.files.folder(ref)
    folder.path.mkdir(parents=True)
    write_json(folder.outcome, Outcome(result="succeeded", step=7))
    folder.spool.touch()
    backend.running.clear()
    faults = Faults(getattr(folder, file), monkeypatch)
    faults.fail("open", ERRORS["broken"], 1_000)

    controller.ticks(3)

    job = store.get_job("job_1")
    assert job is not None
    assert (job.state.phase, job.attempt) == (Phase.STARTING, 1)
    assert f"can't read {getattr(folder, file)}: Input/output error" in (job.message or "")
    faults.stop()
    controller.ticks()
    assert phase(store, ref) == (Phase.SUCCEEDED, 1)


def test_attempt_that_is_given_up_may_commit_no_checkpoint(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    ref = post(store, "job_1")
    controller.ticks(3)
    backend.running.clear()

    controller.ticks()

    assert controller.files.folder(ref).ended.exists()


def test_events_that_were_written_after_the_end_are_read_before_the_next_attempt(
    store: SQLStore, backend: Backend, controller: Controller
) -> None:
    ref = post(store, "job_1")
    controller.ticks(3)
    backend.running.clear()
    controller.ticks()
    assert phase(store, ref) == (Phase.RECOVERING, 1)
    spool = Spool(controller.files.folder(ref).spool)
    spool.append(Steps(records=[step_record(1), step_record(2)]))

    controller.ticks(2)

    assert phase(store, ref) == (Phase.STARTING, 2)
    assert [
        span.last_step for span in store.spans("job_1", "curves", Wanted(most_steps=100, most_spans=100)).spans
    ] == [1, 2]

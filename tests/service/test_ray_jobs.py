"""Attempts on a real Ray cluster with token authentication, and what its outages and its lost answers do to a job."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from ulid import ULID

from ngd_service.client.client import Client
from ngd_service.dispatchers.base import (
    AttemptRef,
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    DispatchError,
    Launch,
)
from ngd_service.dispatchers.files import AttemptFiles
from ngd_service.dispatchers.ray_jobs import RayJobsDispatcher
from ngd_service.failpoint import Failpoint
from ngd_service.job_state import Process
from tests.service.test_crash import assert_nothing_lost_or_doubled, drivers, spec, wait_for_step
from tests.service.test_real_driver import kill_the_driver_and_go_on
from tests.support.attempts import small_spec
from tests.support.backends import NOWHERE
from tests.support.deadline import wait_until
from tests.support.ray_head import RayHead
from tests.support.service_process import FAULT_DRIVER, ServiceProcess

pytestmark = pytest.mark.ray

REAL_DRIVER = [sys.executable, "-m", "ngd_workers.launch"]
RAY_S = 120.0  # a driver that Ray starts takes seconds, on busy cores many


@pytest.fixture
def ref() -> AttemptRef:
    return AttemptRef(f"job_{ULID()}", 1)  # Ray gives a submission id away once


@pytest.fixture
def make(tmp_path: Path, ray_head: RayHead) -> Iterator[Callable[..., RayJobsDispatcher]]:
    made: list[RayJobsDispatcher] = []

    def make(address: str = ray_head.address, token_file: Path | None = ray_head.token_file) -> RayJobsDispatcher:
        files = AttemptFiles(runs_dir=tmp_path, data_dir=None, worker_url=NOWHERE, cluster="given")
        made.append(
            RayJobsDispatcher(
                files, address=address, token_file=token_file, command=FAULT_DRIVER, failpoint=Failpoint(None)
            )
        )
        return made[-1]

    yield make
    for dispatcher in made:
        dispatcher.close()


NO_SUCH_JOB = httpx.MockTransport(lambda request: httpx.Response(404))
Make = Callable[..., RayJobsDispatcher]
Start = Callable[..., ServiceProcess]


def launch(ref: AttemptRef, name: str = "waits") -> Launch:
    return Launch(ref, small_spec(name=name, schedule={"steps": 10}).model_dump(mode="json"), "token")


def submit(dispatcher: RayJobsDispatcher, launch: Launch) -> None:
    """Submits as the reconciler does: a head that has just started may need longer than a request waits."""

    def is_submitted() -> bool:
        try:
            dispatcher.submit(launch)
        except BackendError:
            return False
        return True

    wait_until(is_submitted, "the attempt is submitted", timeout_s=RAY_S)


def has_ended(dispatcher: RayJobsDispatcher, ref: AttemptRef) -> bool:
    return dispatcher.inspect(ref).process is Process.EXITED


class Faulty(httpx.BaseTransport):
    """Hands requests on to Ray, and answers the first one of a method as the test says."""

    def __init__(
        self,
        method: str,
        answer: Callable[[httpx.Response], httpx.Response],
        real: httpx.BaseTransport | None = None,
    ) -> None:
        self.real = real or httpx.HTTPTransport()
        self.method, self.answer, self.times = method, answer, 1

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.real.handle_request(request)
        response.read()
        if request.method == self.method and self.times > 0:
            self.times -= 1
            return self.answer(response)
        return response

    def close(self) -> None:
        self.real.close()


def with_fault(dispatcher: RayJobsDispatcher, transport: httpx.BaseTransport) -> RayJobsDispatcher:
    dispatcher.close()
    dispatcher._http = httpx.Client(base_url=dispatcher._address, transport=transport)
    return dispatcher


def lose(response: httpx.Response) -> httpx.Response:
    raise httpx.ReadTimeout("the answer was lost", request=None)


@pytest.mark.slow
def test_submission_whose_answer_was_lost_is_taken_for_what_it_is(make: Make, ref: AttemptRef, tmp_path: Path) -> None:
    dispatcher = with_fault(make(), Faulty("POST", lose))
    with pytest.raises(BackendUnavailableError, match=r"does not answer \((the answer was lost|timed out)\)"):
        dispatcher.submit(launch(ref, "refuses"))

    submit(dispatcher, launch(ref, "refuses"))

    wait_until(lambda: has_ended(dispatcher, ref), "the driver ends", timeout_s=RAY_S)
    files = AttemptFiles(runs_dir=tmp_path, data_dir=None, worker_url=NOWHERE, cluster="given")
    assert files.log(ref).tail().text.count(b"attempt 1 of refuses") == 1


def test_job_of_another_service_under_the_same_id_is_not_taken_over(make: Make, ref: AttemptRef) -> None:
    dispatcher = make()
    submit(dispatcher, launch(ref, "waits"))

    with pytest.raises(DispatchError, match=rf"has another job with the id {ref.attempt_id}; give each service"):
        make().submit(launch(ref, "refuses"))
    dispatcher.kill(ref)
    wait_until(lambda: has_ended(dispatcher, ref), "the driver ends", timeout_s=RAY_S)


def test_submission_that_ray_has_no_room_for_yet_is_made_again(make: Make, ref: AttemptRef) -> None:
    busy = "Traceback ...\nNo available agent to submit job, please try again later."
    dispatcher = with_fault(make(), Faulty("POST", lambda _: httpx.Response(500, text=busy), NO_SUCH_JOB))

    with pytest.raises(BackendRefusedError, match=r"could not submit the job \(HTTP 500: No available agent"):
        dispatcher.submit(launch(ref))


def test_refused_request_fails_the_job_with_ray_s_last_word(make: Make, ref: AttemptRef) -> None:
    refusal = httpx.Response(400, text="Traceback ...\nTypeError: entrypoint must be a string")
    refused = Faulty("POST", lambda _: refusal, NO_SUCH_JOB)

    with pytest.raises(DispatchError, match="HTTP 400: TypeError: entrypoint must be a string"):
        with_fault(make(), refused).submit(launch(ref))


def test_cluster_that_does_not_answer_is_said_with_its_address(make: Make, ref: AttemptRef) -> None:
    with pytest.raises(BackendUnavailableError, match=f"the Ray cluster at {NOWHERE} does not answer"):
        make(address=NOWHERE).inspect(ref)


def test_outage_names_no_job_for_all_are_told_of_it(make: Make, ref: AttemptRef) -> None:
    broken = f"Traceback ...\nRuntimeError: no answer about {ref.attempt_id} from the head"
    answer = httpx.MockTransport(lambda request: httpx.Response(500, text=broken))

    with pytest.raises(BackendUnavailableError, match="HTTP 500: RuntimeError: no answer about <id> from") as caught:
        with_fault(make(), answer).inspect(ref)

    assert ref.job_id not in str(caught.value)


@pytest.mark.parametrize("token", ["wrong", None])
def test_token_that_ray_refuses_is_said(make: Make, ref: AttemptRef, tmp_path: Path, token: str | None) -> None:
    file = None
    if token is not None:
        file = tmp_path / "token"
        file.write_text(token)

    with pytest.raises(BackendUnavailableError, match="refuses the token of NGD_RAY_TOKEN_FILE"):
        make(token_file=file).inspect(ref)


def test_token_file_that_is_not_there_is_said(make: Make, ref: AttemptRef) -> None:
    with pytest.raises(BackendUnavailableError, match="can't read NGD_RAY_TOKEN_FILE /nowhere/token: No such file"):
        make(token_file=Path("/nowhere/token")).inspect(ref)


@pytest.mark.parametrize("content", [b"two\nlines", b"", b"\xef\xbb\xbftoken", b"with space"])
def test_token_that_is_none_is_refused_without_being_told(
    make: Make, ref: AttemptRef, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)

    with pytest.raises(BackendUnavailableError, match="must hold one token of visible ASCII characters") as caught:
        make(token_file=file).inspect(ref)
    assert "lines" not in str(caught.value)


def test_address_of_something_else_is_said(make: Make, ref: AttemptRef) -> None:
    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>hello</html>"))

    with pytest.raises(BackendUnavailableError, match="is not Ray's dashboard; set NGD_RAY_ADDRESS"):
        with_fault(make(), page).inspect(ref)


@pytest.mark.slow
def test_outcome_that_the_volume_shows_late_is_waited_for(
    make: Make, ref: AttemptRef, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dispatcher = make()
    submit(dispatcher, launch(ref, "refuses"))
    wait_until(lambda: has_ended(dispatcher, ref), "the driver ends", timeout_s=RAY_S)
    outcome = AttemptFiles(runs_dir=tmp_path, data_dir=None, worker_url=NOWHERE, cluster="given").folder(ref).outcome
    content = outcome.read_bytes()

    outcome.unlink()
    seen = dispatcher.inspect(ref)
    assert (seen.process, seen.message) == (Process.RUNNING, "waiting for the outcome on the shared volume")

    outcome.write_bytes(content)
    assert dispatcher.inspect(ref).process is Process.EXITED
    outcome.unlink()
    monkeypatch.setattr("ngd_service.dispatchers.files.OUTCOME_DELAY_S", 0.0)
    assert dispatcher.inspect(ref).process is Process.EXITED


@pytest.fixture
def start_on_ray(start_service: Start, ray_head: RayHead) -> Start:
    def start(**settings: object) -> ServiceProcess:
        return start_service(
            **{"dispatcher": "ray_jobs", "ray_address": ray_head.address, "ray_token_file": str(ray_head.token_file)}
            | settings
        )

    return start


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("after_attempt_commit", marks=pytest.mark.slow),
        "after_spawn",
        pytest.param("after_submit", marks=pytest.mark.slow),
    ],
)
def test_controller_that_dies_while_it_submits_an_attempt_starts_it_once(start_on_ray: Start, place: str) -> None:
    first = start_on_ray(failpoint=place)
    job = first.client.submit(spec(steps=60))
    wait_until(first.has_died, f"the controller dies {place}", timeout_s=RAY_S)

    second = start_on_ray()
    ended = second.client.wait(job.id, timeout_s=RAY_S)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert_nothing_lost_or_doubled(second, ended)
    assert second.client.logs(job.id).count("attempt 1 of steps") == 1


@pytest.mark.slow
def test_job_goes_on_while_the_controller_is_dead(start_on_ray: Start) -> None:
    first = start_on_ray()
    job = first.client.submit(spec(steps=200))
    wait_for_step(first.client, job.id, 20, timeout_s=RAY_S)
    (driver,) = drivers(first, job.id)

    first.kill()
    assert driver.is_running()
    second = start_on_ray()
    assert {process.pid for process in drivers(second, job.id)} <= {driver.pid}  # none if it has ended by now
    ended = second.client.wait(job.id, timeout_s=RAY_S)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1)
    assert_nothing_lost_or_doubled(second, ended)


@pytest.mark.slow
def test_driver_that_dies_is_followed_by_another_attempt(start_on_ray: Start) -> None:
    service = start_on_ray()

    ended = service.client.wait(service.client.submit(spec("dies-once", steps=30)).id, timeout_s=RAY_S)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 2)


@pytest.mark.slow
def test_cancelled_job_that_hears_nothing_is_ended(start_on_ray: Start) -> None:
    service = start_on_ray(cancel_grace_s=0.5, interrupt_grace_s=0.5)
    job = service.client.submit(spec("deaf"))
    wait_until(lambda: service.client.get(job.id).status.phase == "RUNNING", "it runs", timeout_s=RAY_S)

    service.client.cancel(job.id)

    assert service.client.wait(job.id, timeout_s=RAY_S).status.phase == "CANCELLED"
    wait_until(lambda: drivers(service, job.id) == [], "the driver is gone")


@pytest.mark.slow
def test_job_waits_for_a_cluster_that_does_not_answer_and_says_so(start_on_ray: Start, ray_head: RayHead) -> None:
    service = start_on_ray(ray_address=NOWHERE)
    job = service.client.submit(spec(steps=10))
    wait_until(lambda: service.client.get(job.id).status.phase == "STARTING", "the job has its turn")
    words = f"the Ray cluster at {NOWHERE} does not answer"
    wait_until(lambda: words in (service.client.get(job.id).status.message or ""), "the job says what it waits for")
    assert service.client.get(job.id).status.phase == "STARTING"
    service.kill()

    heir = start_on_ray()
    ended = heir.client.wait(job.id, timeout_s=RAY_S)

    assert (ended.status.phase, ended.status.attempt, ended.status.message) == ("SUCCEEDED", 1, None)


def test_job_that_waits_for_a_cluster_can_be_cancelled(start_on_ray: Start) -> None:
    service = start_on_ray(ray_address=NOWHERE, unreachable_s=0.3)
    job = service.client.submit(spec())
    wait_until(lambda: service.client.get(job.id).status.message, "the job says what it waits for")

    service.client.cancel(job.id)

    assert service.client.wait(job.id, timeout_s=30).status.phase == "CANCELLED"


@pytest.mark.slow
def test_real_training_runs_on_the_cluster_from_post_to_result(start_on_ray: Start) -> None:
    service = start_on_ray(driver_command=REAL_DRIVER)
    job = service.client.submit(small_spec(optimizer={"kind": "ngd"}, resources={"workers": 2}).model_dump(mode="json"))

    ended = service.client.wait(job.id, timeout_s=240)

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 1), service.client.logs(job.id)
    assert ended.status.result is not None
    assert ended.status.result.step == 8
    assert_nothing_lost_or_doubled(service, ended)
    log = service.client.logs(job.id)
    assert "[rank 0] step 8/8" in log
    # The end of the job may cut off a thread of Ray's own, which says so with a traceback.
    assert "ngd_workers" not in log.partition("Traceback")[2]


@pytest.mark.slow
def test_killed_driver_of_a_given_cluster_loses_no_step(start_on_ray: Start) -> None:
    service = start_on_ray(driver_command=REAL_DRIVER, retry_backoff_s=5)

    status = kill_the_driver_and_go_on(service)

    assert "the driver was ended by SIGKILL" in (status.message or "")


@pytest.mark.slow
def test_job_that_the_cluster_has_no_room_for_says_so_and_holds_no_slot(start_on_ray: Start) -> None:
    service = start_on_ray(driver_command=REAL_DRIVER, max_running_jobs=2)
    client = service.client
    long = {"steps": 1_000_000, "evaluate_every_steps": 1_000_000}

    def post(name: str, workers: int) -> str:
        spec = small_spec(name=name, schedule=long, resources={"workers": workers})
        return client.submit(spec.model_dump(mode="json")).id

    def message(job_id: str) -> str:
        return client.get(job_id).status.message or ""

    first = post("first", 2)
    wait_until(lambda: client.get(first).status.phase == "RUNNING", "the first runs", timeout_s=RAY_S)
    second, large = post("second", 2), post("large", 4)
    wait_until(lambda: "waiting for 2 CPUs" in message(second), "the second says what it waits for", timeout_s=RAY_S)
    wait_until(lambda: "waiting for 4 CPUs" in message(large), "so does a third, beyond the slots", timeout_s=RAY_S)
    waiting = client.get(second).status
    assert (waiting.phase, waiting.attempt) == ("STARTING", 1)
    assert "0 of the Ray cluster's 2 are free, others hold the rest" in message(second)
    assert "the Ray cluster has 2 in all; add nodes, or cancel the job and ask for less" in message(large)

    client.cancel(first)
    wait_until(lambda: client.get(second).status.phase == "RUNNING", "the second runs", timeout_s=RAY_S)
    client.cancel(large)
    assert client.wait(large, timeout_s=RAY_S).status.phase == "CANCELLED"
    assert client.get(second).status.attempt == 1
    for job_id in (second, large):
        assert "Traceback" not in client.logs(job_id)


@pytest.mark.slow
def test_head_that_is_lost_costs_one_attempt(start_on_ray: Start) -> None:
    first = RayHead()
    try:
        service = start_on_ray(ray_address=first.address, ray_token_file=str(first.token_file), unreachable_s=2.0)
        job = service.client.submit(spec(steps=10_000))
        wait_for_step(service.client, job.id, 20, timeout_s=RAY_S)
    finally:
        first.close()
    wait_until(lambda: service.client.get(job.id).status.attempt == 2, "the attempt is given up", timeout_s=30)
    status = service.client.get(job.id).status
    assert status.phase in ("STARTING", "RECOVERING")
    events: Client = service.client
    lost = [event.data for event in events.events(job.id).events if event.kind == "phase"]
    assert any(data["reason"] == "ClusterUnreachable" for data in lost)

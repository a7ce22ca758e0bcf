"""A browser on the pages of jobs whose worker is the test: what goes over the socket, and what a reader sees."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Page, expect

from service.client import Client
from service.resources import Job
from service.store.sql import SQLStore
from tests.support.attempts import small_spec
from tests.support.browser import CHROMIUM, browser_page
from tests.support.deadline import wait_until
from tests.support.history import long_record, numbered, tell
from tests.support.service_process import ServiceProcess
from workers.events import CheckpointSaved, Evaluation, Steps

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium to drive: apt-get install chromium"),
]
MOST_BYTES_PER_STEP = 2_048
SERIES = """title => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === title);
  const chart = getElement(panel.querySelector('.nicegui-echart').id.slice(1)).chart;
  return chart.getOption().series.map(series => series.data);
}"""


@dataclass
class Worker:
    """Plays the worker of a job: its driver only waits."""

    client: Client
    store: SQLStore
    job: Job
    seq: int = 1

    @property
    def attempt(self) -> str:
        return f"{self.job.id}-a1"

    def has_done(self, num_steps: int, num_statistics: int) -> None:
        self.seq = tell(self.store, self.attempt, num_steps, num_statistics, first_seq=2, total_steps=2_000_000)

    def does(self, step: int, num_statistics: int, loss: float | None = None) -> None:
        self.tells(Steps(records=[long_record(step, num_statistics, loss)]))

    def tells(self, event: Steps | Evaluation | CheckpointSaved) -> None:
        self.store.ingest(self.attempt, [numbered(self.seq, event)])
        self.seq += 1


@dataclass
class Frames:
    """What came over the page's socket."""

    texts: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path_factory.mktemp("service"), max_running_jobs=8, cancel_grace_s=0.2)
    yield service
    service.close()


@pytest.fixture
def worker_of(service: ServiceProcess) -> Iterator[Callable[[], Worker]]:
    """Starts a job that runs until the test is over."""
    store = SQLStore(f"sqlite:///{service.home / 'ngd.sqlite'}")
    started: list[Worker] = []

    def start() -> Worker:
        job = service.client.submit(small_spec(name="waits").model_dump(mode="json"))
        wait_until(lambda: service.client.get(job.id).status.phase == "RUNNING", "the job runs")
        started.append(Worker(service.client, store, job))
        return started[-1]

    yield start
    for worker in started:
        service.client.cancel(worker.job.id)
        service.client.wait(worker.job.id, timeout_s=30)
    store.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def page(complaints: list[str]) -> Iterator[Page]:
    with browser_page(complaints) as page:
        yield page
    assert complaints == []


def open_job(page: Page, service: ServiceProcess, worker: Worker) -> Frames:
    frames = Frames()
    page.on("websocket", lambda socket: socket.on("framereceived", lambda text: frames.texts.append(str(text))))
    page.goto(f"{service.url}/jobs/{worker.job.id}")
    return frames


def see_step(page: Page, step: int) -> None:
    expect(page.get_by_text(f"{step:,} / 2,000,000")).to_be_visible(timeout=30_000)


@pytest.mark.parametrize(("num_steps", "num_statistics"), [(10, 12), (3_000, 160)])
def test_a_step_costs_two_kilobytes_on_the_socket_whatever_came_before(
    service: ServiceProcess,
    worker_of: Callable[[], Worker],
    page: Page,
    num_steps: int,
    num_statistics: int,
) -> None:
    worker = worker_of()
    worker.has_done(num_steps, num_statistics)
    frames = open_job(page, service, worker)
    see_step(page, num_steps)
    worker.does(num_steps + 1, num_statistics)
    see_step(page, num_steps + 1)  # all of the first view is here
    before = frames.num_bytes

    for step in range(num_steps + 2, num_steps + 8):
        worker.does(step, num_statistics)
        see_step(page, step)

    per_step = (frames.num_bytes - before) / 6
    assert per_step <= MOST_BYTES_PER_STEP, "\n".join(frames.texts[-30:])
    loss = page.evaluate(SERIES, "Loss")[0]
    assert [point[0] for point in loss[-6:]] == list(range(num_steps + 2, num_steps + 8))

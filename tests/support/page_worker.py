"""Pages of jobs whose worker is the test: its driver only waits."""

from dataclasses import dataclass, field

from playwright.sync_api import Page, expect

from ngd_service.client.client import Client
from ngd_service.resources import Job
from ngd_service.store.sql import SQLStore
from ngd_workers.contract.events import CheckpointSaved, Evaluation, Steps
from tests.support.history import long_record, numbered, tell
from tests.support.service_process import ServiceProcess

DRAW_MS = 120_000  # a browser without a GPU, on two cores that others use too


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


def open_job(page: Page, service: ServiceProcess, worker: Worker) -> Frames:
    return open_page(page, f"{service.url}/jobs/{worker.job.id}")


def open_page(page: Page, url: str) -> Frames:
    frames = Frames()
    page.on("websocket", lambda socket: socket.on("framereceived", lambda text: frames.texts.append(str(text))))
    page.goto(url)
    return frames


def see_step(page: Page, step: int) -> None:
    expect(page.get_by_text(f"{step:,} / 2,000,000")).to_be_visible(timeout=DRAW_MS)

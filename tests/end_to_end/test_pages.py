"""A browser on the pages of jobs whose worker is the test: what goes over the socket, and what a reader sees."""

import math
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from ngd_workers.contract.events import CheckpointSaved, Evaluation, Steps
from tests.support.attempts import small_spec
from tests.support.browser import DRIVES_A_BROWSER
from tests.support.history import long_record
from tests.support.page_worker import DRAW_MS, Frames, Worker, open_job, open_page, see_step
from tests.support.service_process import ServiceProcess

pytestmark = DRIVES_A_BROWSER
MOST_BYTES_PER_STEP = 2_048
SERIES = """title => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === title);
  const chart = getElement(panel.querySelector('.nicegui-echart').id.slice(1)).chart;
  return chart.getOption().series.map(series => series.data);
}"""

MARKED_STEPS = """title => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === title);
  const chart = getElement(panel.querySelector('.nicegui-echart').id.slice(1)).chart;
  return chart.getOption().series.at(-1).markLine.data.map(line => line.xAxis);
}"""
IN_ONE_GROUP = """['Loss', 'Mean reward', 'Throughput'].every(title => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === title);
  return getElement(panel.querySelector('.nicegui-echart').id.slice(1)).chart.group === 'steps';
})"""


def settled(page: Page, frames: Frames, worker: Worker, num_steps: int, num_statistics: int) -> int:
    """Returns how many bytes the first view took, and a step after it, which shows that all of it is there."""
    see_step(page, num_steps)
    worker.does(num_steps + 1, num_statistics)
    see_step(page, num_steps + 1)
    page.wait_for_function(f"(({SERIES})('Loss'))[0].at(-1)?.[0] === {num_steps + 1}", timeout=DRAW_MS)
    return frames.num_bytes


def test_frame_that_is_laid_out_after_the_points_leaves_them(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    """A chart that was not mounted yet lays its frame out again some milliseconds later, often after its points."""
    worker = worker_of()
    worker.has_done(40, 12)
    frames = open_job(page, service, worker)
    settled(page, frames, worker, 40, 12)
    titles = ("Loss", "Throughput", "Time per step, by phase", "Statistics in use")
    page.wait_for_function(f"(({SERIES})('{titles[-1]}'))[0]?.length > 0", timeout=DRAW_MS)
    drawn = [page.evaluate(SERIES, title) for title in titles]

    page.evaluate("document.querySelectorAll('.nicegui-echart').forEach(e => getElement(e.id.slice(1)).update_chart())")

    assert [page.evaluate(SERIES, title) for title in titles] == drawn
    assert all(series[0] for series in drawn)


@pytest.mark.parametrize(
    ("num_steps", "num_statistics"),
    [(10, 12), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3_000, 12), (20_000, 160)))],
)
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
    before = settled(page, frames, worker, num_steps, num_statistics)

    for step in range(num_steps + 2, num_steps + 8):
        worker.does(step, num_statistics)
        see_step(page, step)

    per_step = (frames.num_bytes - before) / 6
    assert per_step <= MOST_BYTES_PER_STEP, "\n".join(frames.texts[-30:])
    page.wait_for_function(f"(({SERIES})('Loss'))[0].at(-1)[0] === {num_steps + 7}", timeout=DRAW_MS)
    loss = page.evaluate(SERIES, "Loss")[0]
    assert [point[0] for point in loss[-6:]] == list(range(num_steps + 2, num_steps + 8))


def test_table_of_jobs_is_sent_what_has_changed(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    for _ in range(40):
        service.client.cancel(service.client.submit(small_spec(name="steps").model_dump(mode="json")).id)
    others = [job.id for job in service.client.list_jobs(page_size=100).jobs if job.id != worker.job.id]
    for job_id in others:  # one that ends takes another place in the list
        service.client.wait(job_id, timeout_s=30)
    worker.has_done(40, 4)
    frames = open_page(page, service.url)
    see_step(page, 40)
    before = frames.num_bytes

    for step in range(41, 45):
        worker.does(step, 4)
        see_step(page, step)

    assert (frames.num_bytes - before) / 4 < MOST_BYTES_PER_STEP


def test_checkpoints_and_tests_reach_the_charts_by_themselves(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    frames = open_job(page, service, worker)
    before = settled(page, frames, worker, 40, 4)

    worker.does(42, 4, math.nan)
    worker.tells(Evaluation(step=42, epoch=0.1, metrics={"accuracy": 0.75, "loss": 0.25}))
    worker.tells(CheckpointSaved(step=42, path="checkpoints/step-00000042", bytes=2048))

    expect(page.get_by_text("Checkpoint of step 42 saved (2 KiB)")).to_be_attached(timeout=DRAW_MS)
    expect(page.get_by_text("Tested at step 42")).to_be_attached()
    page.wait_for_function(f"(({SERIES})('Loss'))[2].length === 1", timeout=DRAW_MS)
    training, test, lost = page.evaluate(SERIES, "Loss")
    assert (training[-1], test[-1], lost) == ([42, None], [42, 0.25], [[42, 0]])
    assert frames.num_bytes - before < 3 * MOST_BYTES_PER_STEP
    of_reader = re.compile(r"^\d{1,2} \w{3} \d{4}, \d\d:\d\d:\d\d GMT\+9$")
    expect(page.locator("reader-time").first).to_have_text(of_reader)


def test_chart_of_a_metric_that_comes_late_is_drawn_and_moves_with_the_others(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    settled(page, open_job(page, service, worker), worker, 40, 4)
    worker.tells(CheckpointSaved(step=41, path="checkpoints/step-00000041", bytes=2048))
    expect(page.get_by_text("Checkpoint of step 41 saved")).to_be_attached(timeout=DRAW_MS)
    expect(page.get_by_role("alert").filter(has_text="could not be read")).to_be_hidden()

    for step in (42, 43):
        record = long_record(step, 4)
        more = {"metrics": record.metrics | {"mean_reward": step / 2}, "skipped_samples": 2}
        worker.tells(Steps(records=[record.model_copy(update=more)]))
        see_step(page, step)

    expect(page.get_by_role("img", name="Mean reward", exact=True)).to_be_visible(timeout=DRAW_MS)
    page.wait_for_function(f"(({SERIES})('Mean reward'))[0].length === 2", timeout=DRAW_MS)
    assert page.evaluate(SERIES, "Mean reward")[0] == [[42, 21], [43, 21.5]]
    assert page.evaluate(SERIES, "Accuracy")[0][-1][0] == 43
    page.wait_for_function(IN_ONE_GROUP, timeout=DRAW_MS)
    assert page.evaluate(MARKED_STEPS, "Mean reward") == page.evaluate(MARKED_STEPS, "Loss") == [0, 41]
    expect(page.get_by_text("Training mean reward")).to_be_visible()
    expect(page.get_by_text("2 samples could not be read and were left out")).to_be_visible()


def test_page_says_that_it_has_no_connection_and_goes_on_when_it_is_back(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page, complaints: list[str]
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    open_job(page, service, worker)
    see_step(page, 40)
    mark = page.locator(".fresh-word")
    expect(mark).to_have_text("Live")
    page.evaluate("window.mine = true")

    page.evaluate("window.socket.io.engine.close()")  # as a network does that is gone for a moment
    expect(page.locator("#popup")).to_have_attribute("aria-hidden", "false")
    page.evaluate("page.mark()")
    expect(mark).to_have_text("Not connected")
    worker.does(41, 4)

    see_step(page, 41)
    assert page.evaluate("window.mine"), "the page was loaded again"
    expect(mark).to_have_text("Live")
    complaints[:] = [text for text in complaints if "WebSocket" not in text]


def test_what_is_not_there_says_so_in_our_words(service: ServiceProcess, page: Page, complaints: list[str]) -> None:
    for address in ("jobs/job_0", "compare?jobs=job_0,job_1"):
        answer = page.goto(f"{service.url}/{address}")
        assert answer is not None
        assert answer.status == 404
        expect(page.get_by_role("heading", name="There is no such job")).to_be_visible()
        expect(page.get_by_text("job_0")).to_be_visible()
        expect(page.get_by_role("link", name="All jobs", exact=True)).to_be_visible()

    answer = page.goto(f"{service.url}/nowhere")
    assert answer is not None
    assert answer.status == 404
    expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
    page.get_by_role("link", name="All jobs").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    complaints[:] = [text for text in complaints if "404" not in text]


@pytest.mark.slow
def test_age_of_an_ended_job_moves_on(service: ServiceProcess, page: Page) -> None:
    job = service.client.submit(small_spec(name="steps", schedule={"steps": 3}).model_dump(mode="json"))
    ended = service.client.wait(job.id, timeout_s=60)
    assert ended.finished_at is not None
    page.goto(f"{service.url}/jobs/{job.id}")
    expect(page.locator(".fresh-word")).to_have_text("Final")
    shown = page.get_by_text(re.compile("^ended "))
    first = shown.inner_text()

    expect(shown).not_to_have_text(first, timeout=60_000)

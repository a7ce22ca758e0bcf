"""A browser on the list of jobs and on jobs side by side; the jobs' worker is the test."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from ngd_service.store.sql import SQLStore
from ngd_workers.contract.events import Evaluation, Steps, TargetReached
from tests.support.attempts import small_spec
from tests.support.browser import DRIVES_A_BROWSER, browser_page
from tests.support.deadline import wait_until
from tests.support.history import long_record, numbered
from tests.support.service_process import ServiceProcess

pytestmark = DRIVES_A_BROWSER
DRAW_MS = 60_000
TARGET = {"metric": "accuracy", "value": 0.9}
DATA = """title => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === title);
  return getElement(panel.querySelector('.nicegui-echart').id.slice(1)).chart.getOption().series.map(s => s.data);
}"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path_factory.mktemp("service"), max_running_jobs=2, cancel_grace_s=0.2)
    yield service
    service.close()


@pytest.fixture(scope="module")
def jobs(service: ServiceProcess) -> list[str]:
    """An ngd job that is first in steps, an sgd job that is first in seconds, and one that waits for both."""
    store = SQLStore(f"sqlite:///{service.home / 'ngd.sqlite'}")
    ids = [run(service, store, "ngd", steps=20, step_s=0.5), run(service, store, "sgd", steps=40, step_s=0.1)]
    ids.append(service.client.submit(spec("waiting", "sgd")).id)
    store.close()
    return ids


def spec(name: str, kind: str) -> dict[str, object]:
    return small_spec(name="waits", optimizer={"kind": kind, "lr": 0.125}, target=TARGET).model_dump(mode="json") | {
        "labels": {"team": name}
    }


def run(service: ServiceProcess, store: SQLStore, kind: str, *, steps: int, step_s: float) -> str:
    """A job that has reached its target in its last step so far."""
    job_id = service.client.submit(spec(kind, kind)).id
    wait_until(lambda: service.client.get(job_id).status.phase == "RUNNING", "the job runs")
    attempt, start = f"{job_id}-a1", datetime.now(UTC).timestamp()
    wait_until(lambda: store.get_attempt(attempt) is not None, "the attempt is there")
    began = service.client.history(job_id).started_at
    start = start if began is None else began.timestamp()
    records = [
        long_record(step, 2).model_copy(update={"time_s": start + step * step_s}) for step in range(1, steps + 1)
    ]
    end = start + steps * step_s
    metrics = {"accuracy": 0.95, "loss": 0.1}
    events = [
        numbered(2, Steps(records=records)),
        numbered(3, Evaluation(step=steps, epoch=1.0, metrics=metrics)),
        numbered(4, TargetReached(step=steps, metrics=metrics)),
    ]
    store.ingest(attempt, [event.model_copy(update={"time_s": end}) for event in events])
    return job_id


def test_jobs_are_marked_in_the_list_and_compared(service: ServiceProcess, jobs: list[str], page: Page) -> None:
    page.goto(service.url)
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.nth(2).get_by_text(re.compile("number 1 of 1 in the queue: it waits for"))).to_be_visible()
    expect(rows.nth(0)).to_contain_text("40")

    for job_id in jobs[:2]:
        page.locator(f"tr:has(a[href='/jobs/{job_id}'])").get_by_role("checkbox").click()
    expect(page.get_by_text("2 marked")).to_be_visible()
    page.wait_for_url(f"{service.url}/?selected={','.join(jobs[:2])}")
    page.keyboard.press("c")

    expect(page.get_by_role("heading", name="Compare jobs")).to_be_visible()
    page.wait_for_url(f"{service.url}/compare?jobs={','.join(jobs[:2])}")
    names = [f"waits (...{job_id[-4:]})" for job_id in jobs]
    expect(page.get_by_role("status").filter(has_text="To accuracy")).to_have_text(
        f"To accuracy at least 90.00%, {names[0]} was first in steps (20 steps; {names[1]} took 40 steps), and "
        f"{names[1]} was first in seconds (4.0 s; {names[0]} took 10.0 s).",
        timeout=DRAW_MS,
    )
    steps, seconds = (page.evaluate(DATA, f"{what} to accuracy at least 90.00%")[0] for what in ("Steps", "Seconds"))
    assert [bar["value"] for bar in steps] == [20, 40]
    assert [bar["value"] for bar in seconds] == pytest.approx([10, 4])
    expect(page.get_by_role("row", name=re.compile("optimizer.*kind")).first).to_contain_text("sgd")


def test_view_of_a_comparison_is_kept_in_its_address(service: ServiceProcess, jobs: list[str], page: Page) -> None:
    page.goto(f"{service.url}/compare?jobs={','.join(jobs[:2])}&x=seconds&smooth=0.5")
    expect(page.get_by_role("img", name="Loss in training", exact=True)).to_be_visible(timeout=DRAW_MS)
    page.wait_for_function(f"(({DATA})('Loss in training'))[1]?.length === 20", timeout=DRAW_MS)
    smooth, raw, other_smooth, other = page.evaluate(DATA, "Loss in training")[:4]

    assert raw[1][0] - raw[0][0] == pytest.approx(0.5)
    assert (len(smooth), len(other_smooth), len(other)) == (20, 40, 40)
    weights = (1 / 3, 2 / 3)  # of an average with memory 1/2 over two values, whose weights sum to 1
    assert smooth[1][1] == pytest.approx(weights[0] * raw[0][1] + weights[1] * raw[1][1], rel=1e-4)

    page.get_by_role("checkbox", name="Logarithmic vertical axis").click()
    expect(page).to_have_url(re.compile("x=seconds&smooth=0.5&log=y$"))
    page.reload()
    expect(page.get_by_role("img", name="Loss in training", exact=True)).to_be_visible(timeout=DRAW_MS)
    page.wait_for_function(f"(({DATA})('Loss in training'))[1]?.length === 20", timeout=DRAW_MS)
    expect(page.get_by_role("checkbox", name="Logarithmic vertical axis")).to_be_checked()


def test_filters_are_kept_in_the_address_and_find_the_job(service: ServiceProcess, jobs: list[str], page: Page) -> None:
    page.goto(service.url)
    expect(page.locator("tbody tr")).to_have_count(3)

    page.keyboard.press("/")
    page.keyboard.type(jobs[1][-6:].lower())

    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page).to_have_url(f"{service.url}/?q={jobs[1][-6:].lower()}")
    page.goto(f"{service.url}/?label=team%3Dwaiting&order_by=name")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.goto(f"{service.url}/?owner=nobody")
    expect(page.get_by_text("No job passes these filters")).to_be_visible()


def test_phone_gets_a_list_and_no_page_wider_than_itself(service: ServiceProcess, jobs: list[str], page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    for address in ("/", f"/compare?jobs={','.join(jobs)}", f"/jobs/{jobs[0]}"):
        page.goto(service.url + address)
        expect(page.locator(".fresh-word")).to_have_text("Live", timeout=DRAW_MS)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.goto(service.url)
    expect(page.locator(".job-card")).to_have_count(3)
    expect(page.locator("thead")).to_have_count(0)


def test_keys_that_a_page_takes_are_told(service: ServiceProcess, jobs: list[str], page: Page) -> None:
    page.goto(f"{service.url}/jobs/{jobs[0]}")
    expect(page.get_by_role("heading", name="waits")).to_be_visible()

    page.keyboard.press("?")

    sheet = page.get_by_role("dialog", name="Keys")
    expect(sheet).to_contain_text("Compare with")
    page.keyboard.press("Escape")
    page.keyboard.press("c")  # before the browser has taken the focus from the sheet
    expect(page.get_by_text("Mark another job to compare")).to_be_visible()
    expect(page.get_by_role("checkbox", checked=True)).to_have_count(1)
    page.keyboard.press("j")
    page.keyboard.press("x")
    expect(page.get_by_role("button", name="Compare")).to_be_visible()


def test_page_goes_on_by_itself_after_the_service_was_started_again(tmp_path: Path, browser: Browser) -> None:
    service = ServiceProcess(tmp_path / "home")
    port = service.url.rpartition(":")[2]
    with browser_page(browser, []) as page:
        page.goto(f"{service.url}/?order_by=name")
        mark = page.locator(".fresh-word")
        expect(mark).to_have_text("Live")
        service.kill()
        expect(mark).to_have_text("Not connected", timeout=DRAW_MS)

        again = ServiceProcess(tmp_path / "home", port=int(port))

        expect(mark).to_have_text("Live", timeout=DRAW_MS)
        assert page.url.endswith("/?order_by=name")
        again.close()

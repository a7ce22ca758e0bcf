"""A browser on the page of one job: what its reader does there, and what the page then shows."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Locator, Page, expect

from ngd_workers.contract.events import Judged, Steps
from tests.support.attempts import fault_spec, small_spec
from tests.support.browser import DRIVES_A_BROWSER
from tests.support.history import long_record
from tests.support.page_worker import DRAW_MS, Worker, open_page, see_step
from tests.support.service_process import ServiceProcess

pytestmark = DRIVES_A_BROWSER
OPTION = """title => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === title);
  return getElement(panel.querySelector('.nicegui-echart').id.slice(1)).chart.getOption();
}"""
WINDOW = f"(({OPTION})('TITLE')).dataZoom.filter(z => z.type === 'inside').map(z => [z.startValue, z.endValue])[0]"


def panel(page: Page, title: str) -> Locator:
    return page.locator(".panel").filter(has=page.get_by_role("heading", name=title, exact=True))


def opened(page: Page, service: ServiceProcess, worker: Worker, num_steps: int, query: str = "") -> None:
    """Opens the page, and waits until its curves are drawn."""
    open_page(page, f"{service.url}/jobs/{worker.job.id}{query}")
    see_step(page, num_steps)
    expect(page.get_by_role("img", name="Loss", exact=True)).to_be_visible(timeout=DRAW_MS)
    page.wait_for_function(f"(({OPTION})('Loss')).series[0].data?.length === {num_steps}", timeout=DRAW_MS)


def wait_for_window(page: Page, title: str, window: list[int]) -> None:
    page.wait_for_function(f"JSON.stringify({WINDOW.replace('TITLE', title)}) === '{window}'.replace(' ', '')")


def test_all_charts_have_the_zoom_of_the_address_and_a_double_click_shows_all(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    opened(page, service, worker, 40, "?from=10&to=20")

    for title in ("Loss", "Throughput", "Trust in the curvature", "Time per step, by phase"):
        wait_for_window(page, title, [10, 20])
    panel(page, "Throughput").locator(".nicegui-echart").dblclick(position={"x": 200, "y": 100})

    for title in ("Loss", "Throughput"):
        wait_for_window(page, title, [1, 40])
    page.wait_for_function("!location.search.includes('from=')")


def test_map_of_statistics_follows_the_zoom_of_the_curves(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    opened(page, service, worker, 40, "?from=10&to=20")
    in_view = (
        f"(({OPTION})('Statistics in use')).xAxis.map(x => [x.data[x.min ?? 0], x.data[x.max ?? x.data.length - 1]])[0]"
    )

    page.wait_for_function(f"{in_view}?.join() === '10,20'", timeout=DRAW_MS)
    worker.does(41, 4)
    page.wait_for_function(f"(({OPTION})('Statistics in use')).xAxis[0].data.at(-1) === '41'", timeout=DRAW_MS)
    assert page.evaluate(in_view) == ["10", "20"]
    page.evaluate("ngd.zoom(null)")

    page.wait_for_function(f"{in_view}.join() === '1,41'")


def test_drag_zooms_all_charts_and_the_address_keeps_it(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    opened(page, service, worker, 40)
    page.wait_for_function("window.ngd.leader")

    box = panel(page, "Loss").locator(".nicegui-echart").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 120)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 125, steps=4)
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 130, steps=4)
    page.mouse.up()

    page.wait_for_function("/from=\\d+&to=\\d+/.test(location.search)")
    kept = re.search(r"from=(\d+)&to=(\d+)", page.url)
    assert kept is not None
    assert 5 < int(kept[1]) < int(kept[2]) < 35
    shown = page.evaluate(WINDOW.replace("TITLE", "Throughput"))
    assert [round(step) for step in shown] == [int(kept[1]), int(kept[2])]


def test_zoom_into_a_long_run_shows_each_of_its_steps(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(3_000, 2)
    open_page(page, f"{service.url}/jobs/{worker.job.id}")
    see_step(page, 3_000)
    page.wait_for_function("window.ngd.leader")
    within = f"(({OPTION})('TITLE')).series[0].data.filter(([step]) => step >= 1000 && step <= 1100).length"
    page.wait_for_function(f"{within.replace('TITLE', 'Loss')} > 10")
    assert page.evaluate(within.replace("TITLE", "Loss")) < 60

    page.evaluate("ngd.zoom([1000, 1100])")

    for title in ("Loss", "Time per step, by phase"):
        page.wait_for_function(f"{within.replace('TITLE', title)} === 101", timeout=DRAW_MS)
    steps = [step for step, _ in page.evaluate(OPTION, "Loss")["series"][0]["data"]]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 3_000)
    worker.does(3_001, 2)
    see_step(page, 3_001)
    page.wait_for_function(f"(({OPTION})('Loss')).series[0].data.at(-1)[0] === 3001")
    assert page.evaluate(within.replace("TITLE", "Loss")) == 101
    columns = f"(({OPTION})('Statistics in use')).xAxis[0].data"
    page.wait_for_function(f"{columns}.length === 101", timeout=DRAW_MS)
    assert page.evaluate(f"{columns}[0]") == "1,000"
    page.evaluate("ngd.zoom(null)")
    page.wait_for_function(f"{columns}.at(-1) > '2,9' && {columns}.length < 100", timeout=DRAW_MS)


def test_zoomed_view_follows_the_latest_step_if_it_is_to(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    opened(page, service, worker, 40, "?from=30&to=40")
    wait_for_window(page, "Loss", [30, 40])

    page.get_by_role("switch", name="Follow the latest").click()
    page.wait_for_function("window.ngd.follows && location.search.includes('follow=on')")
    worker.does(41, 4)

    wait_for_window(page, "Throughput", [31, 41])


def test_smoothed_curve_has_its_points_behind_it(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    opened(page, service, worker, 40, "?smooth=0.8")
    worker.does(41, 4, loss=3.0)
    see_step(page, 41)
    page.wait_for_function(f"(({OPTION})('Loss')).series[0].data.length === 41")

    smooth, _, points, _ = (series["data"] for series in page.evaluate(OPTION, "Loss")["series"])

    assert points[-1] == [41, 3]
    assert points[-2][1] < smooth[-1][1] < 2
    assert smooth[0] == points[0]


def test_one_spike_does_not_flatten_the_curve_until_it_is_asked_for(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(40, 4)
    worker.does(41, 4, loss=90.0)
    for step in range(42, 61):
        worker.does(step, 4)
    opened(page, service, worker, 60, "?linear=Loss")

    assert page.evaluate(OPTION, "Loss")["yAxis"][0]["max"] < 3
    expect(panel(page, "Loss").get_by_text("1 outlier beyond the axis")).to_be_visible()
    page.get_by_role("switch", name="Ignore outliers").click()

    page.wait_for_function(f"(({OPTION})('Loss')).yAxis[0].max === null")
    page.wait_for_function("location.search.includes('outliers=shown')")
    assert max(value for _, value in page.evaluate(OPTION, "Loss")["series"][0]["data"]) == 90


def test_statistics_are_coloured_by_what_decided_on_them(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(10, 2)
    told = Judged(statistics=[1], changes=[0.01], noises=[0.2], thresholds=[0.4], errors=[None])
    worker.tells(Steps(records=[long_record(11, 2).model_copy(update={"judged": told, "reduction_ratio": 0.9})]))
    opened(page, service, worker, 11)
    page.wait_for_function(f"(({OPTION})('Statistics in use')).series[0].data?.length === 22")
    ratios = page.evaluate(OPTION, "Trust in the curvature")["series"][0]

    page.get_by_role("button", name="Change", exact=True).click()

    page.wait_for_function(f"(({OPTION})('Statistics in use')).series[0].data?.[21]?.[2] === -2")  # its logarithm
    cells = page.evaluate(OPTION, "Statistics in use")["series"][0]["data"]
    assert cells[21][6:] == [0.01, 0.2, 0.4, None]
    assert {cell[2] for cell in cells[:21]} == {"-"}
    assert "colour=change" in page.url
    assert ratios["data"] == [[11, 0.9]]
    assert [end["yAxis"] for end in ratios["markArea"]["data"][0]] == [0.25, 2]


def test_chart_is_saved_as_numbers_and_as_a_picture(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(3, 2)
    opened(page, service, worker, 3)
    save = page.get_by_role("button", name="Save Throughput")

    save.click()
    with page.expect_download() as numbers:
        page.get_by_text("Numbers (CSV)").locator("visible=true").click()
    save.click()
    with page.expect_download() as picture:
        page.get_by_text("Picture (PNG)").locator("visible=true").click()

    lines = numbers.value.path().read_text().splitlines()
    assert (lines[0], len(lines)) == ("step,throughput", 4)
    assert lines[1] == "1,1235.5678"
    assert picture.value.suggested_filename == "throughput.png"
    assert picture.value.path().read_bytes().startswith(b"\x89PNG")


def test_log_is_searched_and_shown_at_its_first_error(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page
) -> None:
    worker = worker_of()
    worker.has_done(3, 2)
    lines = [f"line {i}" for i in range(900)]
    lines[100] = "\x1b[31mRuntimeError: <broken>\x1b[0m"
    log = service.home / "runs" / worker.job.id / "attempts" / "1" / "log.txt"
    log.write_text("\n".join(lines) + "\n")
    opened(page, service, worker, 3)
    shown = page.get_by_role("log")
    expect(shown).to_contain_text("line 899")

    page.get_by_role("button", name="First error").click()
    expect(page.get_by_text("first error at line 101")).to_be_visible()
    expect(shown.locator(".error")).to_have_text("RuntimeError: <broken>")
    assert shown.locator(".ansi-c1").count() == 1
    expect(shown).not_to_contain_text("line 899")
    page.get_by_label("Search the log").fill("LINE 88")
    expect(page.get_by_text("11 of 900 lines hold “LINE 88”")).to_be_visible()
    expect(shown.locator("div")).to_have_count(11)
    page.get_by_role("button", name="Follow", exact=True).click()
    expect(shown).to_contain_text("line 899")
    with page.expect_download() as whole:
        page.get_by_role("link", name="Download", exact=True).click()
    assert whole.value.path().read_text().splitlines() == lines


def test_job_that_never_started_shows_its_error_and_no_empty_charts(service: ServiceProcess, page: Page) -> None:
    job = service.client.submit(small_spec(name="refuses").model_dump(mode="json"))
    service.client.wait(job.id, timeout_s=60)

    page.goto(f"{service.url}/jobs/{job.id}")

    expect(page.get_by_role("alert").filter(has_text="DataNotFound")).to_be_visible()
    expect(page.get_by_text("1 attempt failed: the log around the last error")).to_be_visible()
    expect(page.get_by_label("Last error of attempt 1")).to_contain_text("attempt 1 of refuses")
    expect(page.get_by_role("link", name="Log", exact=True)).to_be_visible()
    for part in ("Metrics", "Curvature", "Step"):
        expect(page.get_by_role("link", name=part, exact=True)).to_be_hidden()
        expect(page.get_by_role("heading", name=part, exact=True)).to_be_hidden()
    expect(page.locator(".timeline i.STARTING").first).to_be_visible()
    expect(page.get_by_label("Spec", exact=True).last).to_contain_text("name: refuses")


def test_attempt_that_failed_has_its_lines_after_another_has_succeeded(service: ServiceProcess, page: Page) -> None:
    job = service.client.submit(fault_spec("dies-once"))
    ended = service.client.wait(job.id, timeout_s=60)
    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 2)

    page.goto(f"{service.url}/jobs/{job.id}")

    expect(page.get_by_text("1 attempt failed: the log around the last error")).to_be_visible()
    expect(page.get_by_label("Last error of attempt 1")).to_be_hidden()
    page.get_by_role("button", name="Attempt 1").click()
    expect(page.get_by_label("Last error of attempt 1")).to_contain_text("attempt 1 of dies-once")


@pytest.mark.parametrize("query", ["?smooth=much&from=9&to=2&colour=pink&outliers=", "?from=nan&to=inf&smooth=-3"])
def test_address_that_makes_no_sense_shows_the_plain_view(
    service: ServiceProcess, worker_of: Callable[[], Worker], page: Page, query: str
) -> None:
    worker = worker_of()
    worker.has_done(5, 2)

    opened(page, service, worker, 5, query)

    assert [series["name"] for series in page.evaluate(OPTION, "Loss")["series"]] == ["training", "test", "not finite"]

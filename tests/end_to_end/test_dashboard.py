"""A browser on the real thing: service, job, workers, pages. Nothing in it is simulated."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from ngd_service.client.client import Client, ServiceError
from ngd_service.client.units import number
from ngd_service.resources import Anatomy, Job
from tests.support.browser import CHROMIUM
from tests.support.deadline import wait_until

START_MS, TRAIN_MS = 180_000, 120_000  # two cores that others use too
POINTS = """title => {
  const panel = [...document.querySelectorAll('.panel')].find(p => p.querySelector('h2')?.innerText === title);
  const chart = getElement(panel.querySelector('.nicegui-echart').id.slice(1)).chart;
  return chart.getOption().series.map(series => [series.name, series.data]);
}"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium to drive: apt-get install chromium"),
]


@dataclass(frozen=True, slots=True)
class Service:
    url: str
    client: Client


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service of its own; its jobs are cancelled before it stops, for they would survive it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"NGD_HOME": str(tmp_path / "home"), "NGD_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-m", "ngd_service"], env=environment)
    with Client(url) as client:
        try:
            wait_until(lambda: process.poll() is not None or _answers(client), "the service starts", timeout_s=60)
            assert process.poll() is None, "the service ended at once"
            yield Service(url, client)
            _end_jobs(client)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def test_dashboard_shows_a_job_live_and_cancels_another(service: Service, page: Page) -> None:
    _open_without_jobs(service, page)
    job = service.client.submit(_spec("digits-live", epochs=6, workers=2))
    _see_it_in_the_table(page, job)
    _follow_it_to_its_end(service, page, job)

    second = service.client.submit(_spec("digits-long", epochs=100_000))
    _cancel_on_its_page(service, page, second)


def _open_without_jobs(service: Service, page: Page) -> None:
    page.goto(service.url)
    expect(page.get_by_text("No jobs yet")).to_be_visible()
    expect(page.get_by_text("ngd submit")).to_be_visible()


def _see_it_in_the_table(page: Page, job: Job) -> None:
    row = page.get_by_role("row").filter(has_text=job.name)
    expect(row.get_by_text("Running")).to_be_visible(timeout=START_MS)
    expect(row.get_by_role("progressbar")).not_to_have_attribute("aria-valuenow", "0", timeout=START_MS)
    row.get_by_role("link", name=job.name).click()


def _follow_it_to_its_end(service: Service, page: Page, job: Job) -> None:
    expect(page.get_by_role("heading", name=job.name)).to_be_visible()
    loss = page.get_by_role("img", name="Loss", exact=True)
    expect(loss).to_have_accessible_description(re.compile("training .* at step"), timeout=START_MS)
    expect(page.locator(".phase.large", has_text="Succeeded")).to_be_visible(timeout=TRAIN_MS)
    expect(page.get_by_text("Final")).to_be_visible()
    ended = service.client.get(job.id)
    metrics = service.client.metrics(job.id)
    for title, names in (
        ("Loss", {"training": "loss", "test": "test_loss"}),
        ("Accuracy", {"training": "accuracy", "test": "test_accuracy"}),
        ("Throughput", {"throughput": "samples_per_s"}),
    ):
        drawn = dict(page.evaluate(POINTS, title))
        for label, name in names.items():
            series = metrics.series[name]
            assert [point[0] for point in drawn[label]] == series.steps, f"{title}, {label}"
            assert [point[1] for point in drawn[label]] == pytest.approx(series.values), f"{title}, {label}"
    statistics = service.client.statistics(job.id, max_points=20)
    cells = dict(page.evaluate(POINTS, "Statistics in use"))["age"]
    assert {cell[1] for cell in cells} == set(range(len(statistics.names)))
    assert metrics.last_step == ended.status.progress.step
    expect(page.get_by_text(f"Checkpoint of step {ended.status.progress.step} saved")).to_be_attached()
    expect(page.get_by_role("button", name="Cancel job")).to_be_hidden()
    _see_layers_and_ranks(service, page, ended)
    _download_a_checkpoint(service, page, ended)
    page.get_by_role("button", name="Loss as a table").click()
    expect(page.get_by_role("cell", name=str(metrics.last_step), exact=True).first).to_be_visible()


def _see_layers_and_ranks(service: Service, page: Page, job: Job) -> None:
    """What the workers tell of their layers, factors and ranks is drawn as the API has it."""
    told, series = service.client.anatomy(job.id), service.client.metrics(job.id).series
    assert told.layers is not None
    assert told.ranks is not None
    for title, names in (
        ("Trust in the curvature", {"KL of a step": "layers.kl", "gradient norm": "layers.gradient_norm"}),
        ("CPU by rank", {"rank 0": "ranks.cpu.0", "rank 1": "ranks.cpu.1"}),
        ("Memory by rank", {"rank 1": "ranks.memory_bytes.1"}),
        ("Sent so far", {"sent": "bytes_so_far"}),
    ):
        drawn = dict(page.evaluate(POINTS, title))
        for label, name in names.items():
            assert [point[0] for point in drawn[label]] == series[name].steps, f"{title}, {label}"
            assert [point[1] for point in drawn[label]] == pytest.approx(series[name].values), f"{title}, {label}"
    drawn = dict(page.evaluate(POINTS, "Sent so far"))
    assert drawn["sent"][-1][1] < drawn["if all were refreshed"][-1][1]
    boxes = dict(page.evaluate(POINTS, "Spectra of the factors"))
    factors = [name for name in service.client.statistics(job.id).names if name.endswith((".A", ".G"))]
    assert [one.name for one in told.spectra] == factors
    told_and_marked = [(box["value"][-1], box["itemStyle"] != {}) for box in boxes["eigenvalues"]]
    assert told_and_marked == [(pytest.approx(one.quantiles[-1]), one.is_estimate) for one in told.spectra]
    estimated = sum(one.is_estimate for one in told.spectra)
    assert 0 < estimated < len(told.spectra)  # small factors are exact
    spectra = _panel(page, "Spectra of the factors")
    expect(spectra.get_by_text(f"{estimated} estimated, with dashed boxes")).to_be_visible()
    assert [place for _, place in boxes["damping"]] == [*range(len(told.spectra))]
    _see_inversions(page, told)
    layers = _panel(page, "Gradient and update of each layer")
    for name in told.layers.names:
        expect(layers.get_by_role("cell", name=name, exact=True)).to_be_visible()
    assert sum(told.ranks.seconds["forward_backward"]) > 0
    for title in ("Phases by rank", "Workers"):
        expect(_panel(page, title).get_by_role("cell", name=told.ranks.hosts[0])).to_have_count(2)
    expect(_panel(page, "Workers").get_by_role("cell", name="no GPU")).to_have_count(4)


def _see_inversions(page: Page, told: Anatomy) -> None:
    """Each factor's newest inversion, and how long each of the two ranks takes for its own."""
    place = _panel(page, "Inversions")
    assert told.world_size == 2
    assert [one.name for one in told.inversions] == [one.name for one in told.spectra]
    for one in told.inversions:
        assert (one.method, one.ending) == ("CHOLESKY", "OK")
        assert one.residual is not None
        where = "every rank" if one.owner is None else f"rank {one.owner}"
        expect(place.get_by_role("row").filter(has_text=one.name)).to_contain_text(
            f"{where}Cholesky{number(one.residual)}"
        )
    drawn = dict(page.evaluate(POINTS, "Inversions"))
    for rank, seconds in enumerate(drawn["as placed"]):
        own = [one.seconds or 0.0 for one in told.inversions if one.owner in (rank, None)]
        assert seconds == pytest.approx(sum(own))
    assert sum(drawn["if placed by these times"]) == pytest.approx(sum(drawn["as placed"]))
    expect(place).to_contain_text("if layers were placed by these times")


def _see_inversions_of_one_rank(service: Service, page: Page, job: Job) -> None:
    place = _panel(page, "Inversions")
    for one in service.client.anatomy(job.id).inversions:
        assert (one.owner, one.method) == (0, "CHOLESKY")
        assert one.residual is not None
        expect(place.get_by_role("row").filter(has_text=one.name)).to_contain_text("rank 0Cholesky")
    expect(place.get_by_text("largest residual")).to_be_visible()
    expect(place.get_by_role("img")).to_be_hidden()


def _panel(page: Page, title: str) -> Locator:
    return page.locator(".panel").filter(has=page.get_by_role("heading", name=title, exact=True))


def _download_a_checkpoint(service: Service, page: Page, job: Job) -> None:
    newest = service.client.checkpoints(job.id)[0]
    with page.expect_download() as download:
        page.get_by_role("link", name="Weights").first.click()
    content = download.value.path().read_bytes()
    assert hashlib.sha256(content).hexdigest() == newest.files["weights.safetensors"].sha256
    expect(page.get_by_role("cell", name=job.id)).to_be_visible()  # in the environment
    expect(page.get_by_role("cell", name="forward backward")).to_be_visible()  # in the phases of a step


def _cancel_on_its_page(service: Service, page: Page, job: Job) -> None:
    page.goto(f"{service.url}/jobs/{job.id}")
    expect(page.locator(".phase.large", has_text="Running")).to_be_visible(timeout=START_MS)
    expect(_panel(page, "Inversions")).to_be_visible(timeout=START_MS)
    _see_inversions_of_one_rank(service, page, job)
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel job").click()
    expect(page.get_by_role("dialog")).to_be_hidden(timeout=TRAIN_MS)  # it fades out
    expect(page.get_by_role("button", name="Cancel job")).to_be_hidden(timeout=TRAIN_MS)
    expect(page.locator(".phase.large", has_text="Cancelled")).to_be_visible(timeout=TRAIN_MS)
    assert service.client.get(job.id).status.phase == "CANCELLED"


def _spec(name: str, *, epochs: int, workers: int = 1) -> dict[str, object]:
    return {
        "name": name,
        "model": {"kind": "small_cnn", "channels": 4, "hidden": 16},
        "data": {"kind": "digits"},
        "optimizer": {"kind": "ngd"},
        "schedule": {"epochs": epochs},
        "batch": {"global_size": 128},
        "resources": {"workers": workers},
    }


def _end_jobs(client: Client) -> None:
    for job in client.list_jobs().jobs:
        if not job.status.is_terminal:
            client.cancel(job.id)
            client.wait(job.id, timeout_s=60)


def _answers(client: Client) -> bool:
    try:
        return client.ready().status == "ok"
    except ServiceError:
        return False

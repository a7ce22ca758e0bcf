"""A service, jobs whose worker is the test, and a page of a browser, for the tests that want no more."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page

from ngd_service.store.sql import SQLStore
from tests.support.attempts import small_spec
from tests.support.browser import browser_page, browser_process
from tests.support.deadline import wait_until
from tests.support.page_worker import Worker
from tests.support.service_process import ServiceProcess


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path_factory.mktemp("service"), max_running_jobs=8, cancel_grace_s=0.2)
    yield service
    service.close()


@pytest.fixture
def worker_of(service: ServiceProcess) -> Iterator[Callable[[], Worker]]:
    """Starts a job that runs until the test is over, or a little longer: the service waits for it at its end."""
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
    store.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browser_process() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    with browser_page(browser, complaints) as page:
        yield page
    assert complaints == []

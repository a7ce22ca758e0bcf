"""A service with a fault driver, shared by the tests that only talk to it, and stores on real databases."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from nicegui import Client as PageClient
from nicegui import ui
from sqlalchemy import create_engine, make_url, text

from ngd_service.app import create_app
from ngd_service.client.client import Client
from ngd_service.settings import load_settings
from ngd_service.store.sql import SQLStore
from tests.fakes.kube.cluster import KubeCluster
from tests.support.ray_head import RayHead
from tests.support.service_process import ServiceProcess


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts controllers on one home, one after the other."""
    started: list[ServiceProcess] = []

    def start(**settings: Any) -> ServiceProcess:
        started.append(ServiceProcess(tmp_path / "home", **settings))
        return started[-1]

    yield start
    for service in started:
        service.close()


@pytest.fixture
def start_on_kuberay(
    kube_cluster: KubeCluster, start_service: Callable[..., ServiceProcess]
) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts controllers on one home that have their attempts run by one KubeRay: by one RayJob each."""
    before = kube_cluster.times_created()
    yield lambda **settings: start_service(**(kube_cluster.settings | settings))
    assert {number for name, number in kube_cluster.times_created().items() if name not in before} <= {1}


@pytest.fixture(
    params=["start_service", pytest.param("start_on_kuberay", marks=pytest.mark.slow)], ids=["local", "kuberay"]
)
def start_anywhere(request: pytest.FixtureRequest) -> Callable[..., ServiceProcess]:
    """Starts controllers on one home, on each dispatcher in turn."""
    start: Callable[..., ServiceProcess] = request.getfixturevalue(request.param)
    return start


@pytest.fixture(scope="session")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path_factory.mktemp("service"), max_running_jobs=4, interrupt_grace_s=0.5)
    yield service
    service.close()


@pytest.fixture
def client(shared_service: ServiceProcess) -> Client:
    return shared_service.client


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    """The app with its controller at rest."""
    app = create_app(load_settings(home=tmp_path))
    yield app
    app.state.container.store.close()


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no XDG_RUNTIME_DIR its import says so
        import pgserver
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that a store may be on."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    url: str = request.getfixturevalue("postgresql_database")
    return url


@pytest.fixture
def postgresql_database(postgres_url: str) -> str:
    """An empty database that several controllers may share."""
    url = make_url(postgres_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url.render_as_string(hide_password=False)


@pytest.fixture
def store(database_url: str) -> Iterator[SQLStore]:
    store = SQLStore(database_url)
    yield store
    store.close()


@pytest.fixture(scope="module")  # dozens of processes: not beside the tests of other files
def ray_head() -> Iterator[RayHead]:
    head = RayHead()
    yield head
    head.close()


@pytest.fixture(scope="module")
def shared_kube_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    cluster = KubeCluster(tmp_path_factory.mktemp("kubernetes")).start()
    yield cluster
    cluster.stop()


@pytest.fixture
def kube_cluster(shared_kube_cluster: KubeCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeCluster]:
    """A Kubernetes with KubeRay and nothing in it, which the kubeconfig of this process and its children names."""
    monkeypatch.setenv("KUBECONFIG", str(shared_kube_cluster.kubeconfig))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(shared_kube_cluster.kubeconfig)
    )
    yield shared_kube_cluster
    shared_kube_cluster.clear()


@pytest.fixture
def sent() -> list[str]:
    """The scripts that the page tells its browser to run."""
    return []


@pytest.fixture
def page(sent: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[PageClient]:
    """A page that no browser has opened yet."""
    with PageClient(ui.page("/test"), request=None) as client:
        monkeypatch.setattr(client, "run_javascript", lambda code, **_: sent.append(code))
        yield client
    client.delete()

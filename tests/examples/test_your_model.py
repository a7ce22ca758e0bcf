"""Each line of docs/guides/your-model.md runs as it stands: commands in the folder of the example, parts in its job."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngd_workers.contract.spec_file import parse_yaml
from ngd_workers.contract.spec_problems import parse_spec
from tests.support import ROOT
from tests.support.own_code import write
from tests.support.service_process import ServiceProcess

FOLDER = ROOT / "examples" / "jobs" / "your_model"
GUIDE = (ROOT / "docs" / "guides" / "your-model.md").read_text()
JOB = (FOLDER / "job.yaml").read_text()
RUN_S = 200


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return [block for block in found if not block.startswith("--8<--")]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service in a folder of its own, with a secret."""
    folder = tmp_path_factory.mktemp("service")
    secrets_dir = write(folder / "secrets", {"hub": "hf_not_a_real_token"})
    service = ServiceProcess(folder / "home", folder=folder, driver_command=None, secrets_dir=str(secrets_dir))
    yield service
    service.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "mine"))


@pytest.mark.slow
def test_commands_run_one_after_the_other(service: ServiceProcess, folder: Path) -> None:
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "NGD_URL": service.url}
    told = []
    for command in blocks("sh"):
        (folder / "job.yaml").write_text(JOB + ("secrets: {HF_TOKEN: hub}\n" if "secrets" in command else ""))
        ended = subprocess.run(
            ["sh", "-ec", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
        told.append(ended.stdout + ended.stderr)

    trained, submitted = told[0], told[2]
    assert float(re.findall(r"test accuracy (0\.\d+)", trained)[-1]) > 0.95
    assert re.search(r"code shipped: 2 files, 1\.\d+ KiB", submitted)
    assert re.search(r"spirals SUCCEEDED at step 80, test accuracy 9\d\.\d+%", submitted)


def test_parts_of_a_job_fit_into_it(folder: Path) -> None:
    for part in blocks("yaml"):
        job, given = parse_yaml(JOB.encode()), parse_yaml(part.encode())
        assert isinstance(job, dict)
        assert isinstance(given, dict)
        parse_spec(job | given)


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_learn_the_same(service: ServiceProcess, folder: Path) -> None:
    spec = JOB.replace("workers: 1", "workers: 2")

    job = service.client.submit(service.client.ship(spec, folder).spec)
    ended = service.client.wait(job.id, timeout_s=RUN_S)

    assert ended.status.phase == "SUCCEEDED", ended.status.message
    assert ended.status.result is not None
    assert ended.status.result.metrics["accuracy"] > 0.95

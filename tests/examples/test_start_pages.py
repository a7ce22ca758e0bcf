"""A reader who follows docs/start, line by line, gets what the pages show."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.chart import render
from tests.support.guide_pages import blocks, changed, lines_missing, shell
from tests.support.service_process import ServiceProcess


def test_loop(tmp_path: Path) -> None:
    outputs = [""]
    for block in blocks("start/your-loop.md"):
        file = tmp_path / "loop.py"
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        elif block.language == "diff":
            file.write_text(changed(file.read_text(), block.text))
        elif block.language == "sh":
            outputs.append(shell(block.text, tmp_path))
        else:
            assert lines_missing(block.text, outputs[-1]) == []

    assert [steps_to_95(output) for output in outputs[1:]] == [60, 50, 20, 20]  # as the page tells
    assert "kfac" in outputs[-1]


def steps_to_95(output: str) -> int:
    lines = re.findall(r"step (\d+) .* accuracy ([\d.]+)", output)
    return next(int(step) for step, accuracy in lines if float(accuracy) >= 0.95)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    service = ServiceProcess(tmp_path_factory.mktemp("service") / "home", driver_command=None)
    yield service
    service.close()


@pytest.mark.slow
@pytest.mark.ray
def test_job(service: ServiceProcess, tmp_path: Path) -> None:
    ids, output = list[str](), ""
    for block in blocks("start/your-job.md"):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        elif block.language == "sh":
            for command in block.text.replace("ngd serve\n", "").splitlines():
                for name, job in zip(("FIRST", "SECOND"), ids, strict=False):
                    command = command.replace(name, job)
                output = shell(command, tmp_path, NGD_URL=service.url)
                ids += re.findall(r"^(\S+)  http", output, re.MULTILINE)
        elif block.language == "python":
            (tmp_path / "use.py").write_text(block.text)
            predicted, true = yaml.safe_load(f"[{shell('python use.py', tmp_path).replace('] [', '], [')}]")
            assert predicted == true
        elif block.language == "text":
            assert lines_missing(block.text, output) == []

    assert len(ids) == 3
    phases = [service.client.get(name).status.phase for name in ids]
    assert phases == ["SUCCEEDED"] * 3


def test_cluster_page_pushes_the_image_that_its_chart_pulls() -> None:
    commands = "".join(block.text for block in blocks("start/cluster.md") if block.language == "sh")
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True)
    pushed = re.findall(r"docker push (\S+)", commands)
    registry = dict(re.findall(r"--set (\S+)=(\S+)", commands))["global.imageRegistry"]

    objects = render({"global": {"imageRegistry": registry}})

    assert set(re.findall(r"'image': '([^']+)'", str(objects))) == set(pushed)
    names = {(thing["kind"].lower(), thing["metadata"]["name"]) for thing in objects}
    assert {("service", "ngd-controller"), ("deployment", "ngd-controller"), ("secret", "ngd-api-keys")} <= names
    assert all(
        name in commands for name in ("service/ngd-controller", "deployment/ngd-controller", "secret ngd-api-keys")
    )

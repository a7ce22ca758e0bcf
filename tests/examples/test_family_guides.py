"""The guides by family of models: each loop learns, and each job trains on data of the form that its page names."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ngd_service.client.edits import with_settings
from ngd_workers.contract.spec_file import parse_yaml
from ngd_workers.contract.spec_problems import parse_spec
from tests.support.data_sets import write_image_folder
from tests.support.guide_pages import blocks, shell
from tests.support.texts import write_text

PAGES = ["vision", "language-models"]
SHORT = ["schedule={steps: 2}", "batch={global_size: 8}", "target=null"]


@pytest.mark.parametrize("page", PAGES)
def test_loop_learns(page: str, tmp_path: Path) -> None:
    (loop,) = (block for block in blocks(f"guides/{page}.md") if block.title.endswith(".py"))
    (tmp_path / loop.title).write_text(loop.text)

    losses = [float(text) for text in re.findall(r"loss (\d+\.\d+)", shell(f"python {loop.title}", tmp_path))]

    assert losses[-1] < 0.5 * losses[0]


# Factors of 4,608 rows would take most of a minute to invert.
@pytest.mark.parametrize(("page", "cheaper"), [("vision", ["optimizer.max_dense=512"]), ("language-models", [])])
def test_job_trains(page: str, cheaper: list[str], tmp_path: Path) -> None:
    (job,) = (block for block in blocks(f"guides/{page}.md") if block.title.endswith(".yaml"))
    (tmp_path / job.title).write_text(yaml.safe_dump(with_settings(parse_yaml(job.text), [*SHORT, *cheaper])))
    write_image_folder(tmp_path / "flowers")
    write_text(tmp_path / "mine.txt", lines=200)

    told = shell(f"ngd train {job.title} --data-dir .", tmp_path)

    assert "succeeded after step 2" in told


@pytest.mark.parametrize("page", PAGES)
def test_rivals_are_jobs(page: str) -> None:
    (job,) = (block for block in blocks(f"guides/{page}.md") if block.title.endswith(".yaml"))
    (commands,) = (block.text for block in blocks(f"guides/{page}.md") if block.text.startswith("ngd submit"))

    for command in commands.splitlines():
        _, _, file, *options = shlex.split(command)
        spec = parse_spec(with_settings(parse_yaml(job.text), [each for each in options if each != "--set"]))

        assert (file, spec.name) == (job.title, parse_yaml(job.text)["name"])

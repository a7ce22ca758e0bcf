"""Specs with settings in the place of others, and jobs that go on from another one, by `ngd submit`."""

import json
from pathlib import Path
from typing import Any

import pytest

from ngd_service.client.edits import with_settings, without_defaults
from ngd_service.client.spec_text import read, written
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec_file import load_spec
from ngd_workers.contract.spec_problems import parse_spec
from tests.service.test_cli import ngd, spec_file
from tests.support import ROOT
from tests.support.service_process import ServiceProcess

RECIPES = ROOT / "workers" / "ngd_workers" / "recipes"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optimizer.lr=0.05", {"optimizer": {"lr": 0.05}, "name": "a"}),
        ("name=b", {"optimizer": {"lr": 1}, "name": "b"}),
        ("data.x={kind: digits}", {"optimizer": {"lr": 1}, "name": "a", "data": {"x": {"kind": "digits"}}}),
        ("target=null", {"optimizer": {"lr": 1}, "name": "a", "target": None}),
        ("name=a=b", {"optimizer": {"lr": 1}, "name": "a=b"}),
    ],
)
def test_setting_takes_the_place_of_the_spec_s(setting: str, expected: dict[str, Any]) -> None:
    spec = {"optimizer": {"lr": 1}, "name": "a"}

    assert with_settings(spec, [setting]) == expected
    assert spec == {"optimizer": {"lr": 1}, "name": "a"}


@pytest.mark.parametrize("setting", ["lr", "=3", "a..b=3", "name.x=3", "a=[1"])
def test_setting_that_makes_no_sense_is_refused(setting: str) -> None:
    with pytest.raises(SpecError, match="--set"):
        with_settings({"name": "a"}, [setting])


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_job_without_its_defaults_is_the_same_job(recipe: Path) -> None:
    spec = load_spec(recipe)
    content = spec.model_dump(mode="json")

    short = without_defaults(content)

    assert parse_spec(short) == spec
    assert read(written(short)) == short
    assert read(written(content)) == content  # whatever its texts and numbers
    assert without_defaults({"name": "of a later version", "modle": 1}) == {"name": "of a later version", "modle": 1}


def test_job_goes_on_from_another_under_other_settings(tmp_path: Path, shared_service: ServiceProcess) -> None:
    url = shared_service.url
    first = ngd("submit", spec_file(tmp_path, "steps"), "--follow", url=url).stdout.split()[0]

    forked = ngd(
        "submit", "--from", f"{first}@10", "--set", "optimizer.lr=0.05", "--set", "resources.workers=2", url=url
    )
    assert forked.returncode == 0, forked.stderr
    spec = json.loads(ngd("get", forked.stdout.split()[0], url=url).stdout)["spec"]

    assert spec["init_from"] | {"ignore": []} == {
        "kind": "checkpoint",
        "run_dir": first,
        "step": 10,
        "takes": "everything",
        "ignore": [],
    }
    assert (spec["optimizer"]["lr"], spec["resources"]["workers"], spec["name"]) == (0.05, 2, "steps")


def test_setting_changes_a_file_s_spec(tmp_path: Path, shared_service: ServiceProcess) -> None:
    posted = ngd("submit", spec_file(tmp_path, "steps"), "--set", "seed=7", url=shared_service.url)

    assert json.loads(ngd("get", posted.stdout.split()[0], url=shared_service.url).stdout)["spec"]["seed"] == 7


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "give the file of a job, or another job with --from"),
        (("--from", "job_x"), 1, "there is no job 'job_x'"),
        (("--from", "job_x@best"), 2, "--from takes JOB or JOB@STEP, got 'job_x@best'"),
    ],
)
def test_what_can_not_be_submitted_is_said(
    shared_service: ServiceProcess, arguments: tuple[str, ...], status: int, message: str
) -> None:
    result = ngd("submit", *arguments, url=shared_service.url)

    assert result.returncode == status
    assert message in " ".join(result.stderr.replace("│", " ").split())

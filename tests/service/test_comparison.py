"""Jobs side by side, by `ngd compare`."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from ngd_service.api.application import api_application
from ngd_service.app import _assemble
from ngd_service.client.client import AsyncClient
from ngd_service.client.comparison import Goal, History, goals, labels, verdict
from ngd_service.settings import load_settings
from ngd_workers.contract.spec_differences import differences
from ngd_workers.contract.spec_file import load_spec
from tests.service.test_cli import ngd, spec_file
from tests.support import ROOT
from tests.support.attempts import small_spec
from tests.support.compared import run
from tests.support.deadline import wait_until
from tests.support.history import start_job, tell
from tests.support.service_process import ServiceProcess

RECIPES = ROOT / "workers" / "ngd_workers" / "recipes"
START = datetime(2026, 1, 1, tzinfo=UTC)


def test_differences_are_those_of_leaves() -> None:
    specs = [
        {"name": "a", "optimizer": {"kind": "ngd", "lr": 0.1, "staleness": {"kind": "fixed"}}, "seed": 0},
        {"name": "b", "optimizer": {"kind": "sgd", "lr": 0.1}, "seed": 0},
        {"name": "b", "optimizer": {"kind": "sgd", "lr": 0.2}, "seed": 0},
    ]

    assert differences(specs) == {
        "name": ["a", "b", "b"],
        "optimizer.kind": ["ngd", "sgd", "sgd"],
        "optimizer.lr": [0.1, 0.1, 0.2],
        "optimizer.staleness.kind": ["fixed", None, None],
    }


def test_defaults_of_another_kind_are_no_differences() -> None:
    recipes = [load_spec(RECIPES / name).model_dump(mode="json") for name in ("digits-ekfac.yaml", "digits-sgd.yaml")]

    found = differences(recipes)

    assert found["optimizer.kind"] == ["ngd", "sgd"]
    assert found["optimizer.preconditioner.kind"] == ["ekfac", None]
    assert found["optimizer.damping"] == [0.01, None]
    assert "optimizer.bucket_mb" not in found  # has its default


def test_goal_that_was_reached_long_ago_is_found_among_thousands_of_tests(tmp_path: Path) -> None:
    parts = _assemble(load_settings(home=tmp_path))
    claim = start_job(parts.store)
    tell(parts.store, f"{claim.job.id}-a1", 2_500, evaluate_every=1)

    async def read() -> History:
        async with AsyncClient("http://127.0.0.1", transport=httpx.ASGITransport(api_application(None, parts))) as api:
            return await api.history(claim.job.id)

    history = asyncio.run(read())
    parts.store.close()

    assert len(history.evaluations) == 2_500
    reached = history.reached(Goal("loss", 1 / 40, "lower"))
    assert reached is not None
    assert reached[0] == 40


@pytest.mark.parametrize(
    ("better", "bound", "reached"),
    [("lower", 0.5, (20, 7.0)), ("lower", 0.1, None), ("higher", 0.85, (10, 3.0)), ("higher", 1.0, None)],
)
def test_goal_is_reached_by_the_first_step_that_is_as_good(
    better: str, bound: float, reached: tuple[int, float] | None
) -> None:
    values = {10: 0.9, 20: 0.4, 30: 0.3}
    seconds = {10: 3.0, 20: 7.0, 30: 11.0}
    history = History(START, [(s, START + timedelta(seconds=seconds[s]), {"m": v}) for s, v in values.items()])

    assert history.reached(Goal("m", bound, better)) == reached
    assert history.reached(Goal("another", bound, better)) is None


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ({"a": ("SUCCEEDED", None), "b": ("SUCCEEDED", None)}, "None of them reached accuracy at least 97.00%."),
        ({"a": ("RUNNING", None), "b": ("SUCCEEDED", None)}, "None of them has reached accuracy at least 97.00% yet."),
        (
            {"a": ("SUCCEEDED", (50, 3.0)), "b": ("RUNNING", None)},
            "Only a reached accuracy at least 97.00%, at step 50 after 3.0 s; b has not reached it yet.",
        ),
        (
            {"a": ("SUCCEEDED", (50, 70.0)), "b": ("SUCCEEDED", (50, 4.0)), "c": ("SUCCEEDED", (80, 9.0))},
            "To accuracy at least 97.00%, a and b were first in steps (50 steps; c took 80 steps), and b was first in "
            "seconds (4.0 s; c took 9.0 s).",
        ),
        (
            {"a": ("SUCCEEDED", (50, 4.0)), "b": ("SUCCEEDED", (50, 4.0))},
            "To accuracy at least 97.00%, a and b were first in steps (50 steps) and in seconds (4.0 s).",
        ),
    ],
)
def test_verdict_names_who_was_first_in_steps_and_in_seconds(
    runs: dict[str, tuple[str, tuple[int, float] | None]], sentence: str
) -> None:
    compared = {name: run(phase, reached) for name, (phase, reached) in runs.items()}
    (goal,) = goals(job for job, _ in compared.values())

    assert verdict(compared, goal) == sentence


def test_jobs_of_one_name_are_told_apart() -> None:
    (first, _), (second, _) = run("RUNNING", None, id="job_AB12"), run("RUNNING", None, id="job_CD34")

    assert labels([first, second]) == ["digits (...AB12)", "digits (...CD34)"]
    assert labels([first]) == ["digits"]


def test_jobs_are_shown_side_by_side(tmp_path: Path, shared_service: ServiceProcess) -> None:
    target = {"metric": "accuracy", "value": 0.9}
    ids = []
    for lr in (0.1, 0.2):
        file = spec_file(tmp_path, "steps", optimizer={"kind": "sgd", "lr": lr}, target=target)
        ids.append(ngd("submit", file, "--follow", url=shared_service.url).stdout.split()[0])

    lines = ngd("compare", *ids, url=shared_service.url).stdout.splitlines()

    assert lines[0].split() == ids
    rows = {line.split("  ")[0].strip(): line.split() for line in lines[1:]}
    assert rows["optimizer.lr"] == ["optimizer.lr", "0.1", "0.2"]
    assert "optimizer.momentum" not in rows
    assert rows["phase"][1:] == ["SUCCEEDED", "SUCCEEDED"]
    assert rows["step"][1:] == ["20", "20"]
    assert "accuracy at least 90.00%" in rows
    assert "best test result" in rows


def test_comparison_opens_in_a_browser(shared_service: ServiceProcess, tmp_path: Path) -> None:
    ids = [shared_service.client.submit(small_spec(name="steps").model_dump(mode="json")).id for _ in range(2)]
    seen = tmp_path / "seen"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(0o755)

    shown = ngd("compare", *ids, "--open", url=shared_service.url, BROWSER=str(browser)).stdout

    page = f"{shared_service.url}/compare?jobs={','.join(ids)}"
    assert shown.splitlines()[-1] == page
    wait_until(seen.exists, "the browser is started")
    assert seen.read_text().strip() == page


def test_one_job_is_no_comparison(shared_service: ServiceProcess) -> None:
    result = ngd("compare", "job_x", url=shared_service.url)

    assert result.returncode == 2
    assert "two jobs at least" in result.stderr

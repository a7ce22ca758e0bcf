"""The plan of a job: over HTTP, and by `ngd plan`; bad input gets one sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from ngd_dist.cost.plan import Plan
from ngd_service.client.plan_chart import text_chart
from ngd_service.client.plan_view import plan_text
from ngd_service.control.model_cards import ModelCards
from ngd_service.dispatchers.archives import Archives
from ngd_service.errors import InvalidSpecError
from ngd_service.planning import plan_of, read_plan_request
from ngd_workers.contract.spec_problems import SpecProblemsError
from tests.service.test_cli import ngd
from tests.support import ROOT
from tests.support.attempts import small_spec

CARD = {
    "layers": [
        {"name": "0", "inputs": 65, "outputs": 512, "positions": 1},
        {"name": "2", "inputs": 513, "outputs": 10, "positions": 1},
    ],
    "forward_flops": 2 * (64 * 512 + 512 * 10),
    "activation_bytes": 4 * 700,
    "samples": 1437,
}
CLUSTER = {"nodes": 2, "devices_per_node": 4, "device": "v100"}


def request(job: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    spec = small_spec(optimizer={"kind": "ngd", "lr": 0.1}, resources={"workers": 2}, schedule={"epochs": 3})
    return {"job": spec.model_dump(mode="json") | (job or {}), "cluster": CLUSTER, "card": CARD} | changes


def planned(**changes: Any) -> Plan:
    return plan_of(read_plan_request(request(**changes)))


@pytest.fixture
def http(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1:8000")


def test_a_plan_is_answered_and_nothing_is_created(http: TestClient) -> None:
    answer = http.post("/api/v1/jobs:plan", json=request())

    assert answer.status_code == 200, answer.text
    plan = Plan.model_validate(answer.json())
    assert plan.steps == 3 * (1437 // 64)
    assert plan.job_seconds == pytest.approx(plan.steps * plan.step.step_seconds)
    assert plan.step.memory_bytes["weights"] == 4 * (65 * 512 + 513 * 10)
    assert [point.ranks for point in plan.scaling] == [2**i for i in range(11)]
    assert [point.ranks for point in plan.strong_scaling] == [1, 2, 4, 8, 16, 32, 64]  # 64 samples in all
    assert http.get("/api/v1/jobs").json()["jobs"] == []


def test_a_service_whose_jobs_train_elsewhere_wants_the_card(tmp_path: Path) -> None:
    cards = ModelCards(Archives(tmp_path), None, is_here=False)

    assert cards.of(small_spec()) is None
    with pytest.raises(SpecProblemsError, match="ngd plan JOB --cluster FILE --write-card FILE"):
        planned(card=None)


def test_a_service_that_stops_waits_for_no_card(tmp_path: Path) -> None:
    cards = ModelCards(Archives(tmp_path), None, is_here=True)
    cards.close()

    with pytest.raises(InvalidSpecError, match="the model could not be built"):
        cards.of(small_spec())


def test_a_card_needs_the_code_that_the_job_names(http: TestClient) -> None:
    answer = http.post("/api/v1/jobs:plan", json=request({"code": {"directory": "."}}, card=None))

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["detail"] == "code.sha256 is missing: the folder was not shipped"


@pytest.mark.parametrize(
    ("changes", "pointer", "words"),
    [
        ({"cluster": CLUSTER | {"device": "b100"}}, "/cluster", "v100, a100, h100, h200, cpu, got 'b100'"),
        ({"cluster": CLUSTER | {"nods": 3}}, "/cluster/nods", "cluster has no field 'nods'"),
        ({"cluster": CLUSTER | {"nodes": 0}}, "/cluster/nodes", "cluster.nodes must be >= 1, got 0"),
        ({"cluster": CLUSTER | {"nodes": "2"}}, "/cluster/nodes", "cluster.nodes must be a whole number"),
        ({"cluster": CLUSTER | {"between": {"gb_s": 0}}}, "/cluster/between/gb_s", "must be > 0, got 0"),
        (
            {"cluster": CLUSTER | {"device": {"memory_gib": 16, "memory_gb_s": 9}}},
            "/cluster/device/tflops",
            "is missing",
        ),
        ({"engine": "fsdp2"}, "/engine", "engine must be 'bare', 'ddp', 'fsdp'"),
        ({"refresh_share": 0}, "/refresh_share", "refresh_share must be > 0, got 0"),
        ({"job": {"batch": {"global_size": 63}}}, "", "batch.global_size must be a multiple"),
        ({"job": {"modle": {}}}, "/modle", "a job has no field 'modle'"),
    ],
)
def test_bad_input_is_one_problem(http: TestClient, changes: dict[str, Any], pointer: str, words: str) -> None:
    answer = http.post("/api/v1/jobs:plan", json=request(**changes))

    assert answer.status_code == 422
    (item,) = answer.json()["errors"]
    assert item["pointer"] == pointer
    assert words in item["detail"] + (item["hint"] or "")


@pytest.mark.parametrize("body", [[], "x", 3])
def test_a_request_that_is_no_object_is_refused(http: TestClient, body: object) -> None:
    answer = http.post("/api/v1/jobs:plan", json=body)

    assert answer.status_code == 422
    assert "a request for a plan must be an object of fields" in answer.json()["detail"]


def test_a_loop_of_its_own_can_not_be_planned() -> None:
    with pytest.raises(SpecProblemsError, match="names no model and no batch"):
        plan_of(read_plan_request(request() | {"job": {"name": "own", "train": {"function": "a.b:c"}}}))


def test_a_job_that_would_not_fit_is_warned_of_with_a_way_out() -> None:
    tight = CLUSTER | {"device": {"preset": "v100", "memory_gib": 0.0005}}

    plan = planned(cluster=tight)

    assert not plan.step.fits
    assert "it would not fit" in plan.warnings[0]
    assert "batch.micro_size" in plan.warnings[0]
    assert any(not other.fits for other in plan.alternatives)


def test_more_workers_than_devices_are_warned_of() -> None:
    assert "takes 2 workers and the cluster has 1 devices" in planned(cluster={"device": "cpu"}).warnings[0]


def test_what_if_covers_engine_placement_and_fraction() -> None:
    changes = [other.change for other in planned().alternatives]

    assert {"engine fsdp", "engine zero1", "engine zero2", "engine zero3", "strategy all_reduce"} <= set(changes)
    assert "statistics of 25% of the samples" in changes
    assert "strategy owner_sharded, held by 50% of the ranks" in changes
    assert "strategy owner_sharded, held by 0% of the ranks" not in changes  # the job's own


@pytest.mark.parametrize(
    ("job", "engine"),
    [
        ({}, "bare"),
        ({"engine": {"kind": "fsdp"}}, "fsdp"),
        ({"engine": {"kind": "deepspeed", "stage": 1}}, "zero1"),
        ({"optimizer": {"kind": "sgd"}}, "ddp"),
    ],
)
def test_the_engine_of_the_job_is_planned(job: dict[str, Any], engine: str) -> None:
    assert planned(job=job).step.engine == engine
    assert planned(job=job, engine="zero2").step.engine == "zero2"


@pytest.mark.parametrize("optimizer", [{"kind": "sgd"}, {"kind": "adamw"}, {"kind": "lars"}, {"kind": "lamb"}])
def test_other_optimizers_are_planned_too(optimizer: dict[str, Any]) -> None:
    plan = planned(job={"optimizer": optimizer})

    assert set(plan.step.bytes_sent) == {"engine"}
    assert plan.step.seconds["refresh"] == plan.step.seconds["statistics"] == 0
    assert plan.step.memory_bytes["momentum"] == plan.step.memory_bytes["weights"] * (
        1 + (optimizer["kind"] in ("adamw", "lamb"))
    )


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        ({"optimizer": {"kind": "muon"}}, "the planner has no costs of optimizer muon"),
        ({"optimizer": {"kind": "sgd"}, "transform": {"kind": "sngd"}}, "the planner has no costs of transform sngd"),
    ],
)
def test_a_job_whose_costs_are_unknown_is_refused(job: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecProblemsError, match=problem):
        planned(job=job)


def test_a_longer_interval_and_a_smaller_part_cost_less() -> None:
    def seconds(**optimizer: Any) -> float:
        return planned(job={"optimizer": {"kind": "ngd", "lr": 0.1} | optimizer}).step.step_seconds

    every = [seconds(staleness={"kind": "fixed", "steps": steps}) for steps in (1, 5, 50)]
    assert every == sorted(every, reverse=True)
    assert seconds(statistics_fraction=0.25) < seconds()
    assert planned(refresh_share=1.0).step.step_seconds == pytest.approx(every[0])


def test_the_page_in_the_terminal_is_short_and_plain() -> None:
    text = plan_text(planned(), "small")

    assert text.isascii()
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 120
    assert "* same samples on each rank" in text_chart(planned())


def test_planning_loads_no_torch() -> None:
    code = "import sys, ngd_service.planning, ngd_dist.cost.plan; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def files(folder: Path, **job: Any) -> list[str]:
    (folder / "cluster.yaml").write_text("nodes: 2\ndevices_per_node: 4\ndevice: v100\nbetween: {gb_s: 25}\n")
    spec = small_spec(optimizer={"kind": "ngd", "lr": 0.1}, resources={"workers": 2}, **job)
    (folder / "job.json").write_text(spec.model_dump_json())
    return [str(folder / "job.json"), "--cluster", str(folder / "cluster.yaml")]


def test_the_command_makes_the_card_prints_the_plan_and_draws_it(tmp_path: Path) -> None:
    card, plot = tmp_path / "card.json", tmp_path / "scaling.svg"

    result = ngd("plan", *files(tmp_path), "--write-card", str(card), "--plot", str(plot))

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("small: 2,410 weights, 2 layers; 2 x v100, 32 samples each; engine bare")
    assert "time of the job" in result.stdout
    assert json.loads(card.read_text())["samples"] == 1437
    root = ElementTree.fromstring(plot.read_text())
    assert root.find("{*}title") is not None
    assert len(root.findall("{*}polyline")) == 3


def test_the_command_takes_a_card_and_prints_json(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps(CARD))

    result = ngd("plan", *files(tmp_path), "--card", str(tmp_path / "card.json"), "--engine", "zero2", "--json")

    assert Plan.model_validate_json(result.stdout).step.engine == "zero2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--engine", "tpu", "--card", "card.json"],
            "engine must be 'bare', 'ddp', 'fsdp', 'zero0', 'zero1', 'zero2' or 'zero3', got \"tpu\"",
        ),
        (["--shape", "images:3x224"], "--shape must be one of images:3x224x224:1000"),
        (["--refresh-share", "2", "--card", "card.json"], "refresh_share must be <= 1, got 2"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path: Path, options: list[str], words: str) -> None:
    (tmp_path / "card.json").write_text(json.dumps(CARD))
    options = [str(tmp_path / option) if option == "card.json" else option for option in options]

    result = ngd("plan", *files(tmp_path), *options)

    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bad_cluster_file_is_named(tmp_path: Path) -> None:
    arguments = files(tmp_path)
    (tmp_path / "cluster.yaml").write_text("nodes: [1\n")
    (tmp_path / "card.json").write_text(json.dumps(CARD))

    result = ngd("plan", *arguments, "--card", str(tmp_path / "card.json"))

    assert result.returncode == 1
    assert "cluster.yaml is no YAML" in result.stderr

"""An elastic job of the service on a given Ray cluster whose head is lost, with all that it had."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ngd_workers.contract.rundir import AttemptDir
from tests.service.test_crash import all_events, assert_nothing_lost_or_doubled, wait_for_step
from tests.support.attempts import records, small_spec, spooled
from tests.support.deadline import wait_until
from tests.support.ray_head import RayHead
from tests.support.service_process import ServiceProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY_S = 300.0
STEPS = 4000
EVERY_STEPS = 50


def test_head_that_is_lost_costs_an_attempt_and_the_next_one_may_be_smaller(
    start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir()
    head = RayHead(num_cpus=0)
    try:
        for folder in folders[:2]:
            head.add_node(folder)
        token = tmp_path / "token"
        token.write_text(head.token)
        service = start_service(
            driver_command=[sys.executable, "-m", "ngd_workers.launch"],
            dispatcher="ray_jobs",
            ray_address=head.address,
            ray_token_file=str(token),
            unreachable_s=5.0,
        )
        spec = small_spec(
            optimizer={"kind": "ngd", "lr": 0.01},
            schedule={"steps": STEPS, "evaluate_every_steps": STEPS},
            checkpoint={"every_steps": EVERY_STEPS},
            resources={"min_workers": 1, "max_workers": 2},
        )
        job = service.client.submit(spec.model_dump(mode="json"))
        wait_for_step(service.client, job.id, 3 * EVERY_STEPS, timeout_s=RAY_S)
        head.close()
        head = RayHead(num_cpus=0, in_place_of=head)
        head.add_node(folders[2])
        wait_until(lambda: service.client.get(job.id).status.attempt == 2, "the attempt is given up", timeout_s=RAY_S)
        ended = service.client.wait(job.id, timeout_s=RAY_S)
    finally:
        head.close()

    assert (ended.status.phase, ended.status.attempt) == ("SUCCEEDED", 2), ended.status.message
    starts = [event for event in all_events(service.client, job.id) if event.kind == "started"]
    assert [(start.attempt, start.data["world_size"]) for start in starts] == [(1, 2), (2, 1)]
    before = [r.step for r in records(spooled(AttemptDir.of(service.home / "runs" / job.id, 1)))]
    resumed = starts[1].data["resumed_step"]
    assert resumed % EVERY_STEPS == 0
    assert before[-1] - 2 * EVERY_STEPS < resumed <= before[-1]
    for attempt in (1, 2):
        assert_nothing_lost_or_doubled(service, ended, attempt)

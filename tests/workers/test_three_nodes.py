"""An elastic job on a real Ray cluster of a head and two nodes, of which one is drained, one added and one killed."""

import signal
from pathlib import Path

import pytest

from tests.support.attempts import records, spooled
from tests.support.event_service import EventService
from tests.support.recorded_samples import SAMPLES, steps_of_groups
from tests.support.three_nodes import CHANGE_S, EPOCH, EVERY_STEPS, ElasticJob, add_node, three_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_job_goes_on_while_nodes_come_and_go(tmp_path: Path) -> None:
    with (
        three_nodes(tmp_path) as (head, [one, two]),
        EventService() as service,
        ElasticJob(tmp_path / "run", head, service.url) as job,
    ):
        assert job.reaches(1).world_size == 2
        assert job.nodes(1) == {one, two}

        head.drain_node(two)
        assert job.reaches(2).world_size == 1
        assert job.nodes(2) == {one}
        head.kill_node(two)  # as those do who have drained it

        three = add_node(head, tmp_path, "three")
        assert job.reaches(3).world_size == 2
        assert job.nodes(3) == {one, three}

        head.kill_node(three)
        assert job.reaches(4).world_size == 1
        assert job.nodes(4) == {one}

        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(CHANGE_S) == 3, job.attempt.log.read_text()
        assert service.facts() == spooled(job.attempt)

    events = spooled(job.attempt)
    done = [record.step for record in records(events)]
    resumed = [start.resumed_step for start in job.starts]
    told = [event for event in events if event.kind in ("workers_resized", "workers_restarted")]
    assert [event.kind for event in told] == ["workers_resized", "workers_resized", "workers_restarted"]
    assert [(event.before, event.after) for event in told[:2]] == [(2, 1), (1, 2)]
    assert told[0].message.startswith("to be taken away: node ")
    assert told[1].message == "there is room for 2 workers"
    assert told[2].message.endswith("died: 1 in place of 2")
    # Nothing was lost by the drain or the growth, and by the crash what the last checkpoint lacked.
    # A crash right behind a checkpoint costs nothing: then this step was done once.
    before_crash = done[: max(index for index, step in enumerate(done) if step == resumed[3] + 1)]
    assert before_crash == list(range(1, before_crash[-1] + 1))
    assert resumed[3] % EVERY_STEPS == 0
    assert before_crash[-1] - 2 * EVERY_STEPS < resumed[3] <= before_crash[-1]
    assert done[len(before_crash) :] == list(range(resumed[3] + 1, done[-1] + 1))
    samples = steps_of_groups(job.attempt, resumed, passes=2)
    assert sorted(samples) == list(range(1, done[-1] + 1))
    for first in range(1, done[-1] - EPOCH, EPOCH):
        epoch = [index for step in range(first, first + EPOCH) for index in samples[step]]
        assert sorted(epoch) == list(range(SAMPLES))

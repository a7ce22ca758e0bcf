"""An elastic job on a real Ray cluster of a head and two nodes, of which one is drained, one added and one killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ngd_workers.contract.events import Started
from ngd_workers.contract.rundir import AttemptDir
from tests.support import ROOT
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.deadline import wait_until
from tests.support.event_service import EventService
from tests.support.ray_head import RayHead
from tests.support.recorded_samples import SAMPLES, steps_of_groups

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHANGE_S = 300.0  # a busy machine takes a minute to notice a lost node and to start workers
EVERY_STEPS = 20
GLOBAL_SIZE = 32
EPOCH = SAMPLES // GLOBAL_SIZE


@contextmanager
def three_nodes(folder: Path) -> Iterator[tuple[RayHead, list[str]]]:
    """A head that trains nothing itself, and two nodes of one CPU each. Gives the nodes' ids."""
    head = RayHead(num_cpus=0)
    try:
        yield head, [add_node(head, folder, name) for name in ("one", "two")]
    finally:
        head.close()


def add_node(head: RayHead, folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return head.add_node(folder / name)


class Job:
    """An elastic job of one or two workers, and its driver. Its micro-batches take 50 ms to read."""

    def __init__(self, run_dir: Path, head: RayHead, url: str | None = None) -> None:
        options = {"attempt_dir": str(AttemptDir.of(run_dir, 1).path), "sleep_s": 0.05}
        spec = small_spec(
            model={"kind": "mlp", "hidden": [16]},
            data={"kind": "function", "function": "tests.support.recorded_samples:data", "options": options},
            optimizer={"kind": "ngd", "lr": 0.01},
            schedule={"steps": 100_000, "evaluate_every_steps": 100_000},
            batch={"global_size": GLOBAL_SIZE},
            checkpoint={"every_steps": EVERY_STEPS},
            resources={"min_workers": 1, "max_workers": 2},
        )
        self.attempt = make_attempt(run_dir, spec, cluster="given", url=url)
        command = [sys.executable, "-m", "tests.support.quick_driver", str(self.attempt.path)]
        with self.attempt.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | head.environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def starts(self) -> list[Started]:
        return [event for event in self._events if isinstance(event, Started)]

    @property
    def last_step(self) -> int:
        return max((record.step for record in records(self._events)), default=0)

    @property
    def _events(self) -> list:
        return spooled(self.attempt) if self.attempt.spool.exists() else []

    def reaches(self, group: int, steps: int = 2 * EVERY_STEPS) -> Started:
        """Waits until the n-th group has done so many steps; returns its start."""

        def has() -> bool:
            assert self.process.poll() is None, self.attempt.log.read_text()
            return len(self.starts) >= group and self.last_step >= self.starts[group - 1].resumed_step + steps

        wait_until(has, f"group {group} trains; log: {self.attempt.log}", timeout_s=CHANGE_S)
        return self.starts[group - 1]

    def nodes(self, group: int) -> set[str]:
        return {path.name for path in self.attempt.nodes(group).iterdir()}


def test_job_goes_on_while_nodes_come_and_go(tmp_path: Path) -> None:
    with three_nodes(tmp_path) as (head, [one, two]), EventService() as service:
        job = Job(tmp_path / "run", head, service.url)
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
    before_crash = done[: done.index(resumed[3] + 1, resumed[3] + 1)]
    assert before_crash == list(range(1, before_crash[-1] + 1))
    assert resumed[3] % EVERY_STEPS == 0
    assert before_crash[-1] - 2 * EVERY_STEPS < resumed[3] <= before_crash[-1]
    assert done[len(before_crash) :] == list(range(resumed[3] + 1, done[-1] + 1))
    samples = steps_of_groups(job.attempt, resumed, passes=2)
    assert sorted(samples) == list(range(1, done[-1] + 1))
    for first in range(1, done[-1] - EPOCH, EPOCH):
        epoch = [index for step in range(first, first + EPOCH) for index in samples[step]]
        assert sorted(epoch) == list(range(SAMPLES))

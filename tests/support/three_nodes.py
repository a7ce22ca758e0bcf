"""A Ray cluster of a head and two nodes on this machine, and an elastic job on it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from ngd_workers.contract.events import Event, Started
from ngd_workers.contract.rundir import AttemptDir
from tests.support import ROOT
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.deadline import wait_until
from tests.support.ray_head import RayHead
from tests.support.recorded_samples import SAMPLES

__all__ = ["CHANGE_S", "EPOCH", "EVERY_STEPS", "ElasticJob", "add_node", "three_nodes"]

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


class ElasticJob:
    """An elastic job of one or two workers, and its driver. Its micro-batches take 50 ms to read."""

    def __init__(self, run_dir: Path, head: RayHead, url: str | None = None, attempt: int = 1) -> None:
        options = {"attempt_dir": str(AttemptDir.of(run_dir, attempt).path), "sleep_s": 0.05}
        spec = small_spec(
            model={"kind": "mlp", "hidden": [16]},
            data={"kind": "function", "function": "tests.support.recorded_samples:data", "options": options},
            optimizer={"kind": "ngd", "lr": 0.01},
            schedule={"steps": 100_000, "evaluate_every_steps": 100_000},
            batch={"global_size": GLOBAL_SIZE},
            checkpoint={"every_steps": EVERY_STEPS},
            resources={"min_workers": 1, "max_workers": 2},
        )
        self.attempt = make_attempt(run_dir, spec, attempt, cluster="given", url=url)
        command = [sys.executable, "-m", "tests.support.quick_driver", str(self.attempt.path)]
        with self.attempt.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | head.environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the driver, if it still runs."""
        self.process.kill()
        self.process.wait()

    @property
    def starts(self) -> list[Started]:
        return [event for event in self.events if isinstance(event, Started)]

    @property
    def last_step(self) -> int:
        return max((record.step for record in records(self.events)), default=0)

    @property
    def events(self) -> list[Event]:
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

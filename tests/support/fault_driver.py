"""A driver that trains nothing: it reports steps as a real one does, and fails in the way that the job's name says.

    python -m tests.support.fault_driver ATTEMPT_DIR

steps      does schedule.steps steps and succeeds; stops when the service says that the job is cancelled
dies-once  its first attempt is gone after five steps, without a word
dies       so is each of them
late       its first three attempts are gone before they report
forgets    tells nobody of steps 6 to 9
refuses    fails for a reason that another attempt would meet again
waits      reports that it has started, then waits for SIGINT or the file that asks it to stop
deaf       so does this one, but it heeds neither
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from ngd_workers.contract.events import Done, Evaluation, Metric, Started, StepRecord
from ngd_workers.contract.rundir import EXIT_STATUS, NOT_THE_FIRST, AttemptDir, Outcome, write_json
from ngd_workers.report import reporter as reporting
from ngd_workers.report.reporter import SpoolingReporter

STEP_S = 0.02
reporting.FLUSH_S = 1.0  # many tests have no service that would take the last events: none waits ten seconds for it
METRICS = [
    Metric(name="accuracy", label="accuracy", better="higher", unit="share"),
    Metric(name="loss", label="loss", better="lower"),
]
TESTED = {"accuracy": 0.9, "loss": 0.1}
STATISTICS = ["layer.A", "layer.G"]


class FaultDriver:
    def __init__(self, attempt_dir: AttemptDir) -> None:
        self.attempt_dir = attempt_dir
        self.spec = attempt_dir.read_spec()
        facts = attempt_dir.read_facts()
        if facts.cluster == "given" and not attempt_dir.claim():
            sys.exit(NOT_THE_FIRST)
        self.attempt = facts.attempt
        self.total_steps = self.spec.schedule.steps or 1
        self.reporter = SpoolingReporter(attempt_dir)
        self.interrupted = threading.Event()

    def run(self) -> None:
        signal.signal(signal.SIGINT, self._on_interrupt)
        sys.stdout.write(f"attempt {self.attempt} of {self.spec.name}\n")
        sys.stdout.flush()
        if self.spec.name == "refuses":
            self.finish(Outcome(result="failed", reason="DataNotFound", message="no folder '[/x]'; set NGD_DATA_DIR"))
        if self.spec.name == "late" and self.attempt <= 3:
            os._exit(9)
        self.start()
        if self.spec.name in ("waits", "deaf"):
            while not self.is_asked_to_stop():
                self.interrupted.wait(STEP_S)
            self.finish(Outcome(result="cancelled"))
        for step in range(1, self.total_steps + 1):
            self.step(step)
        self.reporter.report(Evaluation(step=self.total_steps, epoch=1.0, metrics=TESTED))
        done = Outcome(result="succeeded", step=self.total_steps, metrics=TESTED, seconds=1.0)
        self.reporter.report(Done(step=self.total_steps, metrics=TESTED, target_step=None, seconds=1.0))
        self.finish(done)

    def start(self) -> None:
        self.reporter.report(
            Started(
                spec=self.spec.model_dump(mode="json"),
                seed=self.spec.seed,
                commit=None,
                versions={},
                world_size=1,
                device="cpu",
                total_steps=self.total_steps,
                steps_per_epoch=10,
                parameters=1,
                resumed_step=0,
                statistics=STATISTICS,
                plain_parameters={},
                metrics=METRICS,
            )
        )

    def step(self, step: int) -> None:
        self.interrupted.wait(STEP_S)
        if self.reporter.stop_request is not None or self.is_asked_to_stop():
            self.finish(Outcome(result="cancelled", step=step))
        if step > 5 and (self.spec.name == "dies" or (self.spec.name == "dies-once" and self.attempt == 1)):
            os._exit(9)
        if not (self.spec.name == "forgets" and 6 <= step <= 9):
            self.reporter.report(step_record(step))

    def finish(self, outcome: Outcome) -> None:
        self.reporter.close()
        write_json(self.attempt_dir.outcome, outcome)
        sys.exit(EXIT_STATUS[outcome.result])

    def is_asked_to_stop(self) -> bool:
        return self.interrupted.is_set() or (self.attempt_dir.stop.exists() and self.spec.name != "deaf")

    def _on_interrupt(self, *_: object) -> None:
        if self.spec.name != "deaf":
            self.interrupted.set()


def step_record(step: int, loss: float | None = None) -> StepRecord:
    """Returns a plausible step of two statistics."""
    return StepRecord(
        step=step,
        epoch=step / 10,
        time_s=time.time(),
        metrics={"accuracy": 1 - 1 / step, "loss": 1 / step if loss is None else loss},
        lr=0.1,
        samples_per_s=100.0,
        seconds={"forward_backward": 0.01, "data": 0.001},
        bytes_sent={"gradients": 8},
        ages=[(step - 1) % 4, (step - 1) % 2],
        intervals=[4, 2],
        failed_inversions=0,
    )


if __name__ == "__main__":
    FaultDriver(AttemptDir(Path(sys.argv[1]))).run()

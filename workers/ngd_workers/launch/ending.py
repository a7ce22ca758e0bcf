"""Records the end of an attempt: the last event, then outcome.json. Imports without torch."""

from ngd_workers.contract.errors import WorkerError
from ngd_workers.contract.events import Cancelled, Done, Event, Failed, metric_words
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import AttemptDir, Outcome, write_json
from ngd_workers.report.reporter import SpoolingReporter

__all__ = ["conclude", "failure", "record", "summary"]

OUTCOME_S = 60.0


def failure(error: WorkerError) -> Outcome:
    """Returns the outcome of an attempt that ended with this error."""
    return Outcome(result="failed", reason=error.reason, message=str(error), retryable=error.retryable)


def conclude(attempt_dir: AttemptDir, outcome: Outcome) -> None:
    """Reports the attempt's last event and writes outcome.json. Called once, after all ranks have stopped writing.

    Raises: StorageError if outcome.json can't be written for OUTCOME_S; without it the attempt counts as dead.
    """
    reporter = SpoolingReporter(attempt_dir)
    reporter.report(_last_event(outcome))
    reporter.close()
    record(attempt_dir, outcome)


def record(attempt_dir: AttemptDir, outcome: Outcome) -> None:
    """Writes outcome.json. Raises: StorageError."""
    insist(lambda: write_json(attempt_dir.outcome, outcome), f"write {attempt_dir.outcome}", patience_s=OUTCOME_S)


def summary(outcome: Outcome) -> str:
    """Returns the outcome as a line for a log."""
    if outcome.result == "failed":
        return f"failed: {outcome.reason}: {outcome.message}"
    if outcome.result == "cancelled":
        return f"cancelled after step {outcome.step}" + (f": {outcome.message}" if outcome.message else "")
    metrics = ", ".join(metric_words("test", outcome.metrics))
    return f"succeeded after step {outcome.step}" + (f": {metrics}" if metrics else "")


def _last_event(outcome: Outcome) -> Event:
    if outcome.result == "cancelled":
        return Cancelled(step=outcome.step)
    if outcome.result == "failed":
        return Failed(reason=outcome.reason or "", message=outcome.message or "", retryable=outcome.retryable)
    return Done.model_validate(outcome.model_dump(include=set(Done.model_fields) - {"kind"}))

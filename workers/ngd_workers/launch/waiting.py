"""Reports the resources for which a driver waits before its workers start."""

import logging

from ngd_workers.contract.events import Waiting
from ngd_workers.contract.rundir import AttemptDir
from ngd_workers.report.reporter import SpoolingReporter

__all__ = ["WaitingReporter"]

log = logging.getLogger(__name__)


class WaitingReporter:
    """Tells the log and the service, and skips repeats. The driver closes it before any worker writes events."""

    def __init__(self, attempt_dir: AttemptDir) -> None:
        self._attempt_dir = attempt_dir
        self._reporter: SpoolingReporter | None = None
        self._told: str | None = None

    def tell(self, message: str | None) -> None:
        """message: the shortage; None: the wait is over."""
        if message == self._told:
            return
        self._told = message
        log.info("%s", message or "waiting is over")
        self._reporter = self._reporter or SpoolingReporter(self._attempt_dir)
        self._reporter.report(Waiting(message=message))

    def close(self) -> None:
        self.tell(None)
        if self._reporter is not None:
            self._reporter.close()

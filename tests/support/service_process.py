"""`ngd serve` as a process of its own, to be talked to over HTTP and to be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ngd_service.client.client import Client
from tests.support.deadline import wait_until

FAULT_DRIVER = (sys.executable, "-m", "tests.support.fault_driver")
NGD = (sys.executable, "-c", "from ngd_service.cli.commands import main; main()")  # the command `ngd`
START_S = 60.0


class ServiceProcess:
    """A controller on a home. Another one may be started on the same home once this one has gone."""

    def __init__(
        self,
        home: Path,
        *,
        module: str = "ngd_service",
        key: str | None = None,
        folder: Path | None = None,
        **settings: Any,
    ) -> None:
        """module: the module that is run; key: the API key of its `client`; folder: where it starts, None: here."""
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._output = home / "serve.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=folder,
                env=os.environ | _environment(home, settings),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: self.url or self.process.poll() is not None, "the service is up", timeout_s=START_S)
        assert self.url, f"the service did not start: {self._output.read_text()}"
        self.client = Client(self.url, key=key)

    @property
    def url(self) -> str:
        line = next((line for line in self._output.read_text().splitlines() if "serves on" in line), "")
        return line.partition("serves on ")[2].partition(";")[0]

    def kill(self) -> None:
        """Ends the controller as a crash does: SIGKILL."""
        self.client.close()
        self.process.kill()
        self.process.wait()

    def has_died(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        """Cancels what still runs, for it would survive, and stops the controller in order."""
        if not self.has_died():
            for job in self.client.list_jobs(page_size=1000).jobs:
                if not job.status.is_terminal:
                    self.client.cancel(job.id)
                    self.client.wait(job.id, timeout_s=30)
            self.process.terminate()
            self.process.wait(timeout=20)
        self.client.close()


def _environment(home: Path, settings: dict[str, Any]) -> dict[str, str]:
    defaults = {"port": 0, "tick_s": 0.1, "lease_s": 1.0, "retry_backoff_s": 0.1, "start_backoff_s": 0.1}
    defaults |= {"driver_command": FAULT_DRIVER}
    given = {name: value for name, value in (defaults | settings).items() if value is not None}
    texts = {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in given.items()}
    return {"NGD_HOME": str(home)} | {f"NGD_{name.upper()}": text for name, text in texts.items()}

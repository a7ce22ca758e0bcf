"""Posts the spool to the service: at least once, in order, from the first event that the service has not stored."""

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from ngd_workers.contract.events import EventReply
from ngd_workers.contract.rundir import AttemptDir, Facts
from ngd_workers.report.spool import Spool

if TYPE_CHECKING:
    import httpx

__all__ = ["Delivery", "StopRequest"]

log = logging.getLogger(__name__)

StopRequest = Literal["resized", "cancelled", "superseded"]

BATCH_EVENTS = 512
BATCH_BYTES = 512 * 1024  # half of the service's limit on a body
INTERVAL_S = 1.0
TIMEOUT_S = 5.0
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 8.0


class Delivery:
    """One attempt's connection to the service. An empty batch asks for the acknowledged seq and the desired state."""

    def __init__(self, attempt_dir: AttemptDir, spool: Spool) -> None:
        self._attempt_dir = attempt_dir
        self._spool = spool
        self._facts: Facts | None = None  # until they can be read
        self._client: httpx.Client | None = None
        self._acknowledged: int | None = None
        self._retry_s = FIRST_RETRY_S
        self._due_s = 0.0
        self.stop_request: StopRequest | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to send, or no service takes it."""
        if self._facts is None:
            return False
        if self._facts.url is None or self.stop_request == "superseded":
            return True
        return self._acknowledged is not None and self._acknowledged >= self._spool.last_seq

    def push(self, *, now: bool = False) -> None:
        """Posts the events that are due; does nothing before the interval or the retry delay has passed.

        Raises: OSError; the reporter then calls it again.
        """
        facts = self._facts = self._facts or self._attempt_dir.read_facts()
        if facts.url is None or self.stop_request == "superseded":
            return
        if now and self._retry_s == FIRST_RETRY_S:
            self._due_s = 0.0
        while time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + INTERVAL_S
            before = self._acknowledged
            if self._post_batch(facts) and self._acknowledged != before and not self.is_done:
                self._due_s = 0.0

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _post_batch(self, facts: Facts) -> bool:
        import httpx

        if self._client is None:
            self._client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        try:
            response = self._client.post(
                f"{facts.url}/api/v1/internal/attempts/{facts.attempt_id}/events",
                content=self._body(),
                headers={"Authorization": f"Bearer {facts.token}", "Content-Type": "application/json"},
            )
        except httpx.TransportError as error:
            return self._retry_later(facts, f"no answer: {error or type(error).__name__}")
        if response.status_code == httpx.codes.CONFLICT:
            self.stop_request = "superseded"
            return False
        if response.status_code != httpx.codes.OK:
            return self._retry_later(facts, f"status {response.status_code}: {response.text[:300]}")
        try:
            return self._accept(facts, EventReply.model_validate_json(response.content))
        except ValidationError:
            return self._retry_later(facts, f"an answer that is no EventReply: {response.text[:300]}")

    def _body(self) -> bytes:
        if self._acknowledged is None:
            return b'{"events":[]}'
        lines = self._spool.lines(self._acknowledged, limit=BATCH_EVENTS, limit_bytes=BATCH_BYTES)
        return b'{"events":[' + b",".join(lines) + b"]}"

    def _accept(self, facts: Facts, reply: EventReply) -> bool:
        if self._retry_s != FIRST_RETRY_S:
            log.info("the service at %s answers again", facts.url)
        self._retry_s = FIRST_RETRY_S
        self._acknowledged = min(reply.acknowledged_seq, self._spool.last_seq)
        if reply.desired == "CANCELLED":
            self.stop_request = "cancelled"
        return True

    def _retry_later(self, facts: Facts, problem: str) -> bool:
        if self._retry_s == FIRST_RETRY_S:
            log.warning("events wait in the spool; the service at %s gave %s", facts.url, problem)
        self._due_s = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
        self._acknowledged = None
        # A restarted service may listen elsewhere, and has then replaced attempt.json.
        with contextlib.suppress(OSError, ValidationError):  # not readable now: the old address may do
            self._facts = self._attempt_dir.read_facts()
        return False

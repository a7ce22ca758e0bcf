"""/internal: what workers call, each with the token of its attempt and no other."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.parts import PartsDep
from service.errors import UnauthorizedError
from workers.events import EventBatch, EventReply

__all__ = ["INTERNAL_PREFIX", "MAX_BATCH_BYTES", "router"]

MAX_BATCH_BYTES = 16 << 20  # one event of 64 steps with 10,000 statistics each; the reporter's batches are far smaller
INTERNAL_PREFIX = "/api/v1/internal"
router = APIRouter(prefix=INTERNAL_PREFIX, tags=["internal"])
bearer = HTTPBearer(auto_error=False, description="The attempt's own token.")


def _authorized(
    parts: PartsDep,
    attempt_id: Annotated[str, Path(description="The attempt's id.")],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    if credentials is None:
        raise UnauthorizedError("send the attempt's token as Authorization: Bearer <token>")
    if not parts.tokens.is_of_attempt(attempt_id, credentials.credentials):
        raise UnauthorizedError(f"the token is not that of attempt {attempt_id!r}")
    return attempt_id


@router.post("/attempts/{attempt_id}/events")
def post_events(parts: PartsDep, attempt_id: Annotated[str, Depends(_authorized)], batch: EventBatch) -> EventReply:
    """Stores what an attempt reports; a repeated delivery changes nothing. The reply says what the user wants."""
    stored = parts.store.ingest(attempt_id, batch.events)
    parts.metrics.events_ingested(stored.new_events)
    return EventReply(desired=stored.desired.value, acknowledged_seq=stored.acknowledged_seq)

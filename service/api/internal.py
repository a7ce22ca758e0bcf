"""/internal: what workers call, each with the token of its attempt and no other."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import FailFast, ValidationError

from service.api.parts import Parts, PartsDep
from service.errors import UnauthorizedError
from workers.events import EventBatch, EventReply, Numbered

__all__ = ["INTERNAL_PREFIX", "MAX_BATCH_BYTES", "router"]

MAX_BATCH_BYTES = 16 << 20  # one event of 64 steps with 10,000 statistics each; the reporter's batches are far smaller
INTERNAL_PREFIX = "/api/v1/internal"
BATCH_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/EventBatch"}}},
    }
}
router = APIRouter(prefix=INTERNAL_PREFIX, tags=["internal"])
bearer = HTTPBearer(auto_error=False, description="The attempt's own token.")


class Batch(EventBatch):
    """A batch as it is read: the first event that is none ends the reading, for there may be millions."""

    events: Annotated[list[Numbered], FailFast()]


async def _authorized(
    parts: PartsDep,
    attempt_id: Annotated[str, Path(description="The attempt's id.")],
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> str:
    if credentials is None:
        raise UnauthorizedError("send the attempt's token as Authorization: Bearer <token>")
    if not parts.tokens.is_of_attempt(attempt_id, credentials.credentials):
        raise UnauthorizedError(f"the token is not that of attempt {attempt_id!r}")
    return attempt_id


@router.post("/attempts/{attempt_id}/events", openapi_extra=BATCH_BODY)
async def post_events(
    request: Request, parts: PartsDep, attempt_id: Annotated[str, Depends(_authorized)]
) -> EventReply:
    """Stores what an attempt reports; a repeated delivery changes nothing. The reply says what the user wants."""
    # Not a parameter: the framework would read a body before it knew who sent it, and parse it while all others wait.
    return await asyncio.to_thread(_store, parts, attempt_id, await request.body())


def _store(parts: Parts, attempt_id: str, body: bytes) -> EventReply:
    try:
        batch = Batch.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in error.errors()]) from error
    stored = parts.store.ingest(attempt_id, batch.events)
    parts.metrics.events_ingested(stored.new_events)
    return EventReply(desired=stored.desired.value, acknowledged_seq=stored.acknowledged_seq)

"""Server-sent events: how a frame is written to a stream and read from one (WHATWG HTML, section 9.2)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel

__all__ = ["KEEP_ALIVE", "Frame", "encode", "frames"]

KEEP_ALIVE = ": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class Frame:
    """One event of a stream. id: what Last-Event-ID resumes from, "" if it does not move the cursor."""

    event: str
    data: str
    id: str

    @property
    def cursor(self) -> int | None:
        return int(self.id) if self.id.isdecimal() else None


def encode(event: str, data: BaseModel | None, *, cursor: int | None = None) -> str:
    """Returns the frame's text. data is one line of JSON, so that it needs one data: field."""
    identity = "" if cursor is None else f"id: {cursor}\n"
    return f"{identity}event: {event}\ndata: {'{}' if data is None else data.model_dump_json()}\n\n"


def frames(lines: Iterable[str]) -> Iterator[Frame]:
    """Yields the frames of a stream; comments are skipped, a frame that the stream's end cuts is dropped."""
    event, identity, data = "message", "", list[str]()
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield Frame(event, "\n".join(data), identity)
            event, identity, data = "message", "", []
        elif name == "event":
            event = value
        elif name == "id":
            identity = value
        elif name == "data":
            data.append(value)

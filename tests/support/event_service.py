"""The service's internal route on a real socket, keeping events by (attempt, seq), with faults to switch on."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from ngd_workers.contract.events import Event, EventBatch, EventReply, Numbered


class EventService:
    """A context manager; `port` 0 takes a free one. Events outlive `stop`, as in a database."""

    def __init__(self) -> None:
        self.events: dict[int, Numbered] = {}
        self.desired = "RUNNING"
        self.status = 200
        self.lose_replies = 0
        self.tokens: set[str | None] = set()
        self.batch_sizes: list[int] = []
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def kinds(self) -> list[str]:
        return [self.events[seq].event.kind for seq in sorted(self.events)]

    def facts(self) -> list[Event]:
        return [self.events[seq].event for seq in sorted(self.events)]

    def start(self) -> Self:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.tokens.add(self.headers["Authorization"])
                reply = service.take(body)
                if reply is None:
                    self.close_connection = True
                    return
                self.send_response(service.status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def take(self, body: bytes) -> bytes | None:
        if self.status != 200:
            return b"{}"
        batch = EventBatch.model_validate_json(body)
        self.batch_sizes.append(len(batch.events))
        for numbered in batch.events:
            known = self.events.setdefault(numbered.seq, numbered)
            assert known == numbered, f"seq {numbered.seq} came again with other content"
        if batch.events and self.lose_replies:
            self.lose_replies -= 1
            return None
        acknowledged = 0
        while acknowledged + 1 in self.events:
            acknowledged += 1
        return EventReply(desired=self.desired, acknowledged_seq=acknowledged).model_dump_json().encode()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

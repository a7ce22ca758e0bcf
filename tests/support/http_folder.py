"""A folder behind a real HTTP server, which knows Range requests or does not."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FolderServer(ThreadingHTTPServer):
    """requests: (path, Range header) of each answered GET. failures: how many GETs are answered by 503 first."""

    daemon_threads = True

    def __init__(self, root: Path, *, knows_ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(root)))
        self.knows_ranges = knows_ranges
        self.requests: list[tuple[str, str | None]] = []
        self.failures = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, ending: str) -> int:
        return sum(path.endswith(ending) for path, _ in self.requests)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        self.server.requests.append((self.path, wanted))
        if not (self.server.knows_ranges and wanted):
            super().do_GET()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = path.read_bytes()
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        assert bounds is not None
        begin, end = int(bounds[1]), min(int(bounds[2]) + 1, len(content))
        if begin >= len(content):
            self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[begin:end])

    def log_message(self, format: str, *args: object) -> None:
        """Writes nothing."""


@contextmanager
def http_folder(root: Path, *, knows_ranges: bool = True) -> Iterator[FolderServer]:
    with FolderServer(root, knows_ranges=knows_ranges) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()

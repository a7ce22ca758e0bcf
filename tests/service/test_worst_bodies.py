"""Whatever a body holds, and whichever route it is sent to, the others are answered meanwhile."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from ngd_service.api.internal import MAX_BATCH_BYTES
from ngd_service.app import create_app
from ngd_service.errors import MAX_BODY_BYTES
from ngd_service.settings import load_settings
from ngd_workers.contract.spec_file import MAX_YAML_BYTES
from tests.support.keys import ALICE, write_keys

SILENT_CPU_S = (
    3.0  # twice what the slowest takes on a slow processor; the pure-Python YAML reader took 22, and held on to it all
)
FIELDS = b",".join(b'"f%x": 1' % number for number in range(90_000))
BODIES = {
    "json/nested": ("application/json", b"[", b""),
    "json/objects": ("application/json", b"{},", b"[%s{}]"),
    "json/numbers": ("application/json", b"1,", b"[%s1]"),
    "json/many-digits": ("application/json", b"1" * 4300 + b",", b"[%s1]"),
    "json/unknown-fields": ("application/json", FIELDS, b"{%s}"),
    "json/wrong-items": ("application/json", b'"x",', b'{"model": {"kind": "mlp", "hidden": [%s1]}}'),
    "json/many-options": ("application/json", b"[1],", b'{"data": {"kind": "function", "options": {"a": [%s1]}}}'),
    "json/long-name": ("application/json", b"x", b'{"%s": 1}'),
    "json/many-events": ("application/json", b"{},", b'{"events": [%s1]}'),
    "yaml/nested": ("application/yaml", b"[", b""),
    "yaml/mappings": ("application/yaml", b"{a: ", b""),
    "yaml/scalars": ("application/yaml", b"a,", b"[%sa]"),
    "yaml/lines": ("application/yaml", b"- a\n", b""),
    "yaml/one-text": ("application/yaml", b"a\n ", b""),
    "yaml/a-mebibyte": ("application/yaml", b"- a\n" * (MAX_BODY_BYTES // 4), b""),
    "form/fields": ("application/x-www-form-urlencoded", b"a=1&", b""),
    "text": ("text/plain", b"a", b""),
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """The app with its controller at rest, for holders of keys."""
    home = tmp_path_factory.mktemp("home")
    app = create_app(load_settings(home=home, api_keys_dir=write_keys(home / "keys", alice=ALICE)))
    yield app
    app.state.container.store.close()


def worst(kind: str, limit: int) -> tuple[str, bytes]:
    """The longest body of its kind that the limit lets through."""
    media_type, piece, frame = BODIES[kind]
    limit = min(limit, MAX_YAML_BYTES) if "yaml" in media_type and len(piece) < limit else limit
    filled = piece * ((limit - len(frame)) // len(piece))
    return media_type, (frame % filled if frame else filled)


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Each route of the API, and the login, that takes a POST, with the key that it asks for."""
    token = app.state.container.tokens.of_attempt("none-a1")
    paths = [path for path, operations in app.openapi()["paths"].items() if "post" in operations]
    named = [path.replace("{job_id}", "job_none").replace("{attempt_id}", "none-a1") for path in paths]
    return [(path, token if "/internal/" in path else ALICE) for path in [*named, "/login"]]


@pytest.mark.parametrize("kind", BODIES)
def test_worst_body_leaves_the_others_answered(app: FastAPI, kind: str) -> None:
    """Counted in the process's CPU seconds between two answers of /healthz, which a busy machine does not stretch."""
    silent_s, answers = asyncio.run(asked_meanwhile(app, kind))

    assert silent_s < SILENT_CPU_S
    assert {answer.status_code for answer in answers} <= {200, 303, 400, 401, 404, 413, 415, 422}
    assert len(answers) == 2 * len(routes(app))
    assert max(len(answer.content) for answer in answers) < 64 << 10


async def asked_meanwhile(app: FastAPI, kind: str) -> tuple[float, list[httpx.Response]]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        posts = [
            asyncio.create_task(post(client, path, key, *worst(kind, limit(path))))
            for path, key in routes(app)
            for _ in range(2)
        ]
        done, silent_s = asyncio.gather(*posts), 0.0
        while not done.done():
            began_s = time.process_time()
            await asyncio.sleep(0)  # the loop turns
            assert (await client.get("/healthz")).status_code == 200
            silent_s = max(silent_s, time.process_time() - began_s)
        return silent_s, await done


def limit(path: str) -> int:
    return MAX_BATCH_BYTES if "/internal/" in path else MAX_BODY_BYTES


async def post(client: httpx.AsyncClient, path: str, key: str, media_type: str, body: bytes) -> httpx.Response:
    headers: dict[str, Any] = {"Content-Type": media_type, "Authorization": f"Bearer {key}"}
    return await client.post(path, content=body, headers=headers)

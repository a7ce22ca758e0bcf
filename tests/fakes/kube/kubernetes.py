"""A Kubernetes API server with nothing in it but RayJobs, for clients that can't tell it from a real one.

    python -m tests.fakes.kube.kubernetes PORT TOKEN STATE_FILE [HISTORY]

What it keeps to: uid, resourceVersion, generation, 409 for a name that is taken and for a version that is old, Status
objects, label selectors, watches with 410 Gone, the status subresource, finalizers, field validation, bearer tokens,
deletions that wait for pods and such as do not, a quota of RayJobs (PUT /quota, {"rayjobs": 2} or null).
PUT /faults tells it how to misbehave: a list of {"method", "path", "kind", "times", ...}, see `Faults`.
"""

import asyncio
import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tests.fakes.kube.rayjob_schema import FOREGROUND, Json, problems, without_unknown

Key = tuple[str, str]
HISTORY = 500  # events that a watch can go back to
COLLECTION = "/apis/ray.io/v1/namespaces/{namespace}/rayjobs"


class StatusError(Exception):
    """Becomes the Status object that Kubernetes answers with."""

    def __init__(self, code: int, reason: str, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.code = code
        self.content = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        } | extra


def not_found(name: str) -> StatusError:
    return StatusError(404, "NotFound", f'rayjobs.ray.io "{name}" not found', details={"name": name, "kind": "rayjobs"})


class Store:
    """The objects and what has happened to them; in a file, so that they survive the server."""

    def __init__(self, path: Path, history: int) -> None:
        self.path = path
        self.history = history
        self.changed = threading.Condition()
        self.objects: dict[Key, Json] = {}
        self.created: dict[str, int] = {}  # how often each name was
        self.events: list[tuple[int, str, Json]] = []
        self.version = 0
        self.forgotten = 0  # events up to this version are not known any more
        self.quota: int | None = None  # of RayJobs in a namespace
        if path.exists():
            kept = json.loads(path.read_text())
            self.version = self.forgotten = kept["version"]
            self.created = kept["created"]
            self.objects = {(o["metadata"]["namespace"], o["metadata"]["name"]): o for o in kept["objects"]}

    def get(self, key: Key) -> Json:
        try:
            return self.objects[key]
        except KeyError:
            raise not_found(key[1]) from None

    def put(self, kind: str, key: Key, content: Json) -> Json:
        """Stores it under a new version; one that has nothing left to be done before its deletion is deleted."""
        self.version += 1
        content["metadata"]["resourceVersion"] = str(self.version)
        if "deletionTimestamp" in content["metadata"] and not content["metadata"].get("finalizers"):
            kind = "DELETED"
            self.objects.pop(key, None)
        else:
            self.objects[key] = content
        self.events.append((self.version, kind, content))
        if len(self.events) > self.history:
            self.forgotten = self.events.pop(0)[0]
        temporary = self.path.with_suffix(".tmp")
        kept = {"version": self.version, "created": self.created, "objects": list(self.objects.values())}
        temporary.write_text(json.dumps(kept))
        temporary.replace(self.path)
        self.changed.notify_all()
        return content

    def admit(self, namespace: str, name: str) -> None:
        """As the quota's admission does, before anybody looks whether the name is taken. Raises: StatusError."""
        used = sum(where == namespace for where, _ in self.objects)
        if self.quota is not None and used >= self.quota:
            counted = "count/rayjobs.ray.io"
            said = f"requested: {counted}=1, used: {counted}={used}, limited: {counted}={self.quota}"
            raise StatusError(403, "Forbidden", f'rayjobs.ray.io "{name}" is forbidden: exceeded quota: few, {said}')

    def selected(self, namespace: str, selector: str) -> list[Json]:
        return [o for (where, _), o in sorted(self.objects.items()) if where == namespace and matches(o, selector)]


def matches(content: Json, selector: str) -> bool:
    """Returns whether its labels are as the selector (a=b,c!=d,e,!f) says."""
    labels = content["metadata"].get("labels") or {}
    for term in filter(None, selector.split(",")):
        if "!=" in term:
            name, value = term.split("!=")
            held = labels.get(name) != value
        elif "=" in term:
            name, value = term.replace("==", "=").split("=")
            held = labels.get(name) == value
        else:
            held = (term.lstrip("!") in labels) != term.startswith("!")
        if not held:
            return False
    return True


def merged(target: Any, patch: Any) -> Any:
    """Returns RFC 7386's merge."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def checked(content: Json, strict: bool) -> Json:
    """Returns it as it is stored. Raises: StatusError 400 for unknown fields if strict, 422 for wrong values."""
    unknown, wrong = problems(content)
    if unknown and strict:
        listed = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise StatusError(
            400, "BadRequest", f'RayJob in version "v1" cannot be handled as a RayJob: strict decoding error: {listed}'
        )
    if wrong:
        name = content.get("metadata", {}).get("name")
        causes = [{"reason": "FieldValueInvalid", "message": text, "field": path} for path, text in wrong]
        said = ", ".join(f"{path}: Invalid value: {text}" for path, text in wrong)
        message = f'RayJob.ray.io "{name}" is invalid: {said}'
        raise StatusError(422, "Invalid", message, details={"name": name, "kind": "RayJob", "causes": causes})
    return without_unknown(content)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_app(store: Store, token: str) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.exception_handler(StatusError)
    def _status(_request: Request, error: StatusError) -> JSONResponse:
        return JSONResponse(error.content, error.code)

    @app.middleware("http")
    async def _authorize(request: Request, call_next: Any) -> Any:
        if token and request.headers.get("Authorization", "").lower() != f"bearer {token}".lower():
            error = StatusError(401, "Unauthorized", "Unauthorized")
            return JSONResponse(error.content, 401)
        return await call_next(request)

    @app.get(COLLECTION)
    def list_or_watch(request: Request, namespace: str, labelSelector: str = "", resourceVersion: str = "") -> Any:
        if request.query_params.get("watch", "").lower() in ("1", "true"):
            until = time.monotonic() + float(request.query_params.get("timeoutSeconds", 60))
            return StreamingResponse(watch(store, namespace, labelSelector, resourceVersion, until))
        with store.changed:
            items = store.selected(namespace, labelSelector)
            metadata = {"resourceVersion": str(store.version)}
            return {"apiVersion": "ray.io/v1", "kind": "RayJobList", "metadata": metadata, "items": items}

    @app.post(COLLECTION)
    async def create(request: Request, namespace: str, fieldValidation: str = "Warn") -> JSONResponse:
        content = checked(await request.json(), fieldValidation == "Strict")
        metadata = content["metadata"]
        key = (namespace, metadata["name"])
        with store.changed:
            store.admit(*key)
            if key in store.objects:
                raise StatusError(409, "AlreadyExists", f'rayjobs.ray.io "{key[1]}" already exists')
            content.pop("status", None)
            metadata |= {"namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
            store.created[key[1]] = store.created.get(key[1], 0) + 1
            return JSONResponse(store.put("ADDED", key, content), 201)

    @app.put("/quota")
    async def limit(request: Request) -> None:
        store.quota = (await request.json())["rayjobs"]

    @app.get("/created")
    def created() -> dict[str, int]:
        return store.created

    @app.get(COLLECTION + "/{name}")
    @app.get(COLLECTION + "/{name}/status")
    def get(namespace: str, name: str) -> Json:
        with store.changed:
            return store.get((namespace, name))

    @app.api_route(COLLECTION + "/{name}{status:path}", methods=["PUT", "PATCH"])
    async def change(
        request: Request, namespace: str, name: str, status: str = "", fieldValidation: str = "Warn"
    ) -> Json:
        body = await request.json()
        with store.changed:
            old = store.get((namespace, name))
            given = merged(old, body) if request.method == "PATCH" else body
            version = body.get("metadata", {}).get("resourceVersion")
            if version not in (None, old["metadata"]["resourceVersion"]):
                said = "the object has been modified; please apply your changes to the latest version and try again"
                raise StatusError(409, "Conflict", f'Operation cannot be fulfilled on rayjobs.ray.io "{name}": {said}')
            new = replaced(old, checked(given, fieldValidation == "Strict"), is_status=status == "/status")
            return store.put("MODIFIED", (namespace, name), new)

    @app.delete(COLLECTION + "/{name}")
    async def delete(request: Request, namespace: str, name: str) -> Json:
        raw = await request.body()
        options = json.loads(raw) if raw else {}
        policy = request.query_params.get("propagationPolicy") or options.get("propagationPolicy")
        with store.changed:
            old = store.get((namespace, name))
            uid = (options.get("preconditions") or {}).get("uid", old["metadata"]["uid"])
            if uid != old["metadata"]["uid"]:
                raise StatusError(409, "Conflict", f"Precondition failed: UID in precondition: {uid}")
            metadata = old["metadata"] | {"deletionTimestamp": old["metadata"].get("deletionTimestamp", now())}
            if policy == "Background":  # also of one whose deletion has waited for its pods so far
                metadata["finalizers"] = [of for of in metadata.get("finalizers", []) if of != FOREGROUND]
            # One that the operator has never seen has no pods to wait for.
            if policy == "Foreground" and metadata.get("finalizers") and FOREGROUND not in metadata["finalizers"]:
                metadata["finalizers"] = [*metadata["finalizers"], FOREGROUND]
            return store.put("MODIFIED", (namespace, name), old | {"metadata": metadata})

    return app


def replaced(old: Json, given: Json, *, is_status: bool) -> Json:
    """Returns what is stored when `given` is written over `old`; a write of the status changes that alone."""
    if is_status:
        return old | {"status": given.get("status", {})}
    fixed = {name: old["metadata"][name] for name in ("name", "namespace", "uid", "creationTimestamp", "generation")}
    fixed |= {name: value for name, value in old["metadata"].items() if name == "deletionTimestamp"}
    if given["spec"] != old["spec"]:
        fixed["generation"] += 1
    new = given | {"metadata": given["metadata"] | fixed}
    return {name: value for name, value in new.items() if name != "status"} | (
        {"status": old["status"]} if "status" in old else {}
    )


def watch(store: Store, namespace: str, selector: str, version: str, until: float) -> Iterator[str]:
    """Yields a line for each change after `version`, or for each object and each change if there is none."""
    with store.changed:
        if not version:
            seen, first = store.version, [("ADDED", o) for o in store.selected(namespace, selector)]
        else:
            seen, first = int(version), []
        is_forgotten = bool(version) and seen < store.forgotten
        if is_forgotten:
            gone = StatusError(410, "Expired", f"too old resource version: {seen} ({store.forgotten})")
            first = [("ERROR", gone.content)]
    yield from (json.dumps({"type": kind, "object": content}) + "\n" for kind, content in first)
    is_over = is_forgotten
    while not is_over:
        left_s = until - time.monotonic()
        with store.changed:
            if store.version == seen:
                store.changed.wait(max(0.0, min(1.0, left_s)))
            happened = [event for event in store.events if event[0] > seen]
            seen = store.version
        for _, kind, content in happened:
            if content["metadata"]["namespace"] == namespace and matches(content, selector):
                yield json.dumps({"type": kind, "object": content}) + "\n"
        is_over = left_s <= 0


class Faults:
    """The outermost layer: answers in the server's stead, or says nothing.

    status        answers {"status": 503, "message": ..., "headers": {...}} without doing what was asked
    hang          never answers, and does nothing
    lose_answer   does what was asked, and closes the connection without a word
    refuse        closes the connection at once
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.planned: list[Json] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] == "/faults":
            return await self._plan(scope, receive, send)
        fault = self._next(scope["method"], scope["path"])
        if fault is None:
            return await self.app(scope, receive, send)
        if fault["kind"] == "status":
            said = {"kind": "Status", "message": fault.get("message", "an injected fault"), "code": fault["status"]}
            return await JSONResponse(said, fault["status"], fault.get("headers"))(scope, receive, send)
        if fault["kind"] == "hang":
            await asyncio.sleep(600)
        if fault["kind"] == "lose_answer":
            await self.app(scope, receive, _swallow)
        send.__self__.transport.abort()

    def _next(self, method: str, path: str) -> Json | None:
        for fault in self.planned:
            if fault["times"] > 0 and fault.get("method", method) == method and path.endswith(fault.get("path", "")):
                fault["times"] -= 1
                return fault
        return None

    async def _plan(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        if request.method == "PUT":
            self.planned = [{"times": 1} | fault for fault in await request.json()]
        await JSONResponse(self.planned)(scope, receive, send)


async def _swallow(_message: Any) -> None:
    pass


if __name__ == "__main__":
    port, secret, state = sys.argv[1:4]
    kept = Store(Path(state), int(sys.argv[4]) if len(sys.argv) > 4 else HISTORY)
    uvicorn.run(Faults(make_app(kept, secret)), host="127.0.0.1", port=int(port), log_level="warning", lifespan="off")

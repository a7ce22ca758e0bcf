"""As much of a Kubernetes API server as Helm needs: discovery, objects by path, selectors, merges, immutable fields.

Nothing runs in it. It is for what `helm template` cannot show: lookups, upgrades, and what an uninstall leaves.
"""

import copy
import json
import re
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.fakes.kube.field_managers import defaulted, server_side_apply
from tests.support.chart import CHART, HELM3, Object, tool

KINDS = {  # of each API, the kinds and their names in paths
    "v1": {
        "Secret": "secrets",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
        "ConfigMap": "configmaps",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Pod": "pods",
    },
    "apiregistration.k8s.io/v1": {"APIService": "apiservices"},
    "apps/v1": {"Deployment": "deployments"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "gateway.networking.k8s.io/v1": {"HTTPRoute": "httproutes"},
    "monitoring.coreos.com/v1": {
        "PodMonitor": "podmonitors",
        "PrometheusRule": "prometheusrules",
        "ServiceMonitor": "servicemonitors",
    },
    "networking.k8s.io/v1": {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "ray.io/v1": {"RayCluster": "rayclusters"},
    "rbac.authorization.k8s.io/v1": {"Role": "roles", "RoleBinding": "rolebindings"},
}
# What an API server refuses to change, as Kubernetes documents it.
IMMUTABLE = {
    "deployments": ("selector",),
    "persistentvolumeclaims": ("accessModes", "storageClassName"),
}
OBJECT = re.compile(r"^/(?:api|apis)/(?:[\w.]+/)?v\d+/namespaces/[\w-]+/(?P<plural>\w+)(?:/(?P<name>[\w.-]+))?$")


class HelmCluster:
    """A server of its own thread. `helm` runs the command of Helm 3 against it; `objects` is what it holds."""

    def __init__(self, folder: Path, without: tuple[str, ...] = ()) -> None:
        """without: APIs that it does not know."""
        self.objects: dict[tuple[str, str], Object] = {}
        self._apis = {api: kinds for api, kinds in KINDS.items() if api not in without}
        self._lock = threading.Lock()
        self._helm = tool(HELM3, "installing and upgrading with Helm 3")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._kubeconfig = folder / "kubeconfig"
        self._folder = folder

    def __enter__(self) -> Self:
        where = {"server": f"http://127.0.0.1:{self._server.server_port}"}
        self._kubeconfig.touch(mode=0o600)
        self._kubeconfig.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "fake", "cluster": where}],
                    "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "nobody"}}],
                    "users": [{"name": "nobody", "user": {}}],
                    "current-context": "fake",
                }
            )
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def helm(self, verb: str, values: dict[str, Any] | None = None, *, chart: Path = CHART) -> str:
        """Returns what the command said. Raises: AssertionError with its message if it failed."""
        command = [str(self._helm), *verb.split(), "ngd", "--namespace", "ngd", "--kubeconfig", str(self._kubeconfig)]
        if values is not None:
            command += [str(chart), "--disable-openapi-validation", "-f", "-"]
        home = {"HOME": str(self._folder)}  # Helm keeps what it learned of the server there
        text = yaml.safe_dump(values)
        done = subprocess.run(command, input=text, env=home, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def manifest(self, values: dict[str, Any], *, chart: Path = CHART) -> list[Object]:
        """Returns what Helm would send for these values, having looked up what is here; nothing here changes."""
        with tempfile.TemporaryDirectory() as folder, HelmCluster(Path(folder)) as copied:
            copied.objects = copy.deepcopy(self.objects)
            copied.helm("install", values, chart=chart)
            text = copied.helm("get manifest")
        return [one for one in yaml.safe_load_all(text) if one]

    def apply(self, manifest: list[Object], *, manager: str = "helm", force: bool = False) -> None:
        """Applies the objects on the server's side, as Helm 4 does. Raises: ConflictError."""
        plurals = {kind: plural for kinds in KINDS.values() for kind, plural in kinds.items()}
        release = {"meta.helm.sh/release-name": "ngd", "meta.helm.sh/release-namespace": "ngd"}
        for one in copy.deepcopy(manifest):
            one["metadata"]["annotations"] = (one["metadata"].get("annotations") or {}) | release
            key = plurals[one["kind"]], one["metadata"]["name"]
            self.objects[key] = server_side_apply(self.objects.get(key), one, manager, force=force)

    def names(self, plural: str) -> set[str]:
        return {name for kind, name in self.objects if kind == plural and not name.startswith("sh.helm.release")}

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        """Returns status and content of one request."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        found = OBJECT.match(path)
        if not found:
            content = _discovery(path, self._apis)
            return (200, content) if content else _problem(404, path)
        plural, name = found["plural"], found["name"] or (body or {}).get("metadata", {}).get("name")
        with self._lock:
            if method == "GET" and not found["name"]:
                return 200, self._listed(plural, query.get("labelSelector", [""])[0])
            return self._one(method, (plural, str(name)), body)

    def _listed(self, plural: str, selector: str) -> Object:
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        held = [one for (kind, _), one in sorted(self.objects.items()) if kind == plural]
        items = [one for one in held if wanted.items() <= one["metadata"].get("labels", {}).items()]
        api, kind = next((api, kind) for api, kinds in KINDS.items() for kind, name in kinds.items() if name == plural)
        return {"apiVersion": api, "kind": f"{kind}List", "metadata": {}, "items": items}

    def _one(self, method: str, key: tuple[str, str], body: Any) -> tuple[int, Any]:
        held = self.objects.get(key)
        if method == "POST":
            if held is not None:
                return _problem(409, key[1])
            self.objects[key] = defaulted(body)
            return 201, self.objects[key]
        if held is None:
            return _problem(404, key[1])
        if method == "DELETE":
            del self.objects[key]
        elif method in {"PATCH", "PUT"}:
            changed = _merged(held, body) if method == "PATCH" else body
            for field in IMMUTABLE.get(key[0], ()):
                if held.get("spec", {}).get(field) != changed.get("spec", {}).get(field):
                    return _problem(422, f"{key[1]}: spec.{field}: field is immutable")
            self.objects[key] = held = defaulted(changed)
        return 200, held


def _discovery(path: str, apis: dict[str, dict[str, str]]) -> Object | None:
    groups = {api.partition("/")[0]: api for api in apis if "/" in api}
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = {name: {"groupVersion": api, "version": api.partition("/")[2]} for name, api in groups.items()}
        listed = [{"name": name, "versions": [one], "preferredVersion": one} for name, one in versions.items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    api = path.removeprefix("/apis/").removeprefix("/api/")
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
        for kind, plural in apis.get(api, {}).items()
    ]
    return {"kind": "APIResourceList", "groupVersion": api, "resources": resources} if resources else None


def _merged(held: Any, patch: Any) -> Any:
    """A JSON merge patch; a strategic one's directions, which begin with $, are left out."""
    if not isinstance(held, dict) or not isinstance(patch, dict):
        return patch
    merged = dict(held)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif not key.startswith("$"):
            merged[key] = _merged(merged.get(key), value)
    return merged


def _problem(status: int, message: str) -> tuple[int, Object]:
    reason = {404: "NotFound", 409: "AlreadyExists", 422: "Invalid"}[status]
    return status, {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": message,
        "code": status,
    }


def _handler(cluster: HelmCluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body leave together, else each answer waits 40 ms for an acknowledgement

        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, content = cluster.answer(self.command, self.path, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    return Handler

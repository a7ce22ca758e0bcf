"""RayJobs at a Kubernetes API server: create, get, delete; each refusal's meaning. The only user of `kubernetes`.

No call is tried again here, and none takes longer than its timeouts: the reconciler comes back by itself.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngd_service.dispatchers.base import (
    BackendFullError,
    BackendRefusedError,
    BackendUnavailableError,
    DispatchError,
)
from ngd_service.errors import StartupError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, ApiException, Configuration

__all__ = ["AlreadyExistsError", "NotAllowedError", "RayJobApi", "connect"]

log = logging.getLogger(__name__)

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
CONNECT_S, READ_S = 3.0, 10.0
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
AWAY = frozenset({408, 429})  # and 5xx: asked again later
VERBS = "create, get and delete on rayjobs.ray.io"

ADVICE = {
    400: "the RayJob template (NGD_RAYJOB_TEMPLATE) does not fit the installed KubeRay",
    401: "the controller's credentials are not taken: check its service account, or the kubeconfig",
    403: f"the controller's service account needs a role with {VERBS}",
    404: "install KubeRay, and check that the namespace is there (NGD_KUBERNETES_NAMESPACE)",
    422: "the RayJob template (NGD_RAYJOB_TEMPLATE) does not fit the installed KubeRay",
}
FINAL = frozenset({400, 422})  # to a create: the same RayJob is refused again; the other refusals may be lifted
QUOTA_IS_FULL = "exceeded quota"  # in the 403 of Kubernetes' quota admission


class AlreadyExistsError(Exception):
    """There is a RayJob of that name."""


class NotAllowedError(BackendRefusedError):
    """Kubernetes does not let the controller create it: for good, or until the API server has read its roles."""


class RayJobApi:
    """The RayJobs of one namespace. Every call may raise BackendUnavailableError."""

    def __init__(self, client: "ApiClient", namespace: str) -> None:
        from kubernetes.client import CustomObjectsApi

        self.namespace = namespace
        self._api = CustomObjectsApi(client)
        self._where = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}

    def create(self, body: dict[str, Any]) -> None:
        """Raises: AlreadyExistsError, BackendFullError, NotAllowedError; DispatchError for bad content."""
        # Strict: a field that KubeRay does not know would otherwise be dropped in silence.
        self._call("create_namespaced_custom_object", body=body, field_validation="Strict", field_manager="ngd")

    def get(self, name: str) -> dict[str, Any] | None:
        rayjob: dict[str, Any] | None = self._call("get_namespaced_custom_object", name=name, is_absence_fine=True)
        return rayjob

    def delete(self, name: str, uid: str, *, waits_for_pods: bool = True) -> None:
        """Has it and its pods deleted. Nothing happens if it has gone.

        waits_for_pods: it stays to be seen until its pods have gone. A later deletion that does not wait lifts that.
        """
        from kubernetes.client import V1DeleteOptions, V1Preconditions

        policy = "Foreground" if waits_for_pods else "Background"
        options = V1DeleteOptions(propagation_policy=policy, preconditions=V1Preconditions(uid=uid))
        self._call("delete_namespaced_custom_object", name=name, body=options, is_absence_fine=True)

    def _call(self, method: str, *, is_absence_fine: bool = False, **arguments: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        verb, name = method.partition("_")[0], arguments.get("name") or arguments["body"]["metadata"]["name"]
        try:
            return getattr(self._api, method)(**self._where, **arguments, _request_timeout=(CONNECT_S, READ_S))
        except ApiException as error:
            # A server that does not serve RayJobs (yet) knows no path: that says nothing of this one.
            if error.status == 404 and is_absence_fine and _message(error)[0] == "NotFound":
                return None
            raise self._problem(error, verb, name) from error
        except (HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise BackendUnavailableError(f"Kubernetes does not answer: {reason}") from error

    def _problem(self, error: "ApiException", verb: str, name: str) -> Exception:
        status, (reason, said) = int(error.status or 0), _message(error)
        if verb == "get":  # all jobs are told of it, and none of another's RayJob
            return BackendUnavailableError(self._sentence(status, "get RayJobs", said.replace(f' "{name}"', "")))
        sentence = self._sentence(status, f"{verb} RayJob {name}", said)
        if verb != "create":
            return BackendRefusedError(sentence)  # a job that runs goes on, whatever its controller may not do
        if status == 409 and reason == "AlreadyExists":
            return AlreadyExistsError(said)
        if status == 403 and QUOTA_IS_FULL in said:
            return BackendFullError(
                f"RayJob {name} waits for room in the quota of namespace {self.namespace}: Kubernetes says: {said}"
            )
        if status in FINAL:
            return DispatchError(sentence)
        return (NotAllowedError if status in ADVICE else BackendRefusedError)(sentence)

    def _sentence(self, status: int, what: str, said: str) -> str:
        if status in ADVICE:
            return f"Kubernetes refuses to {what} in namespace {self.namespace} ({status}): {said}; {ADVICE[status]}"
        if status not in AWAY and 400 <= status < 500 and status != 409:
            log.warning("kubernetes_answer status=%s what=%s said=%s", status, what, said)
        return f"Kubernetes can't {what} now ({status}): {said}"


def connect(url: str, namespace: str) -> RayJobApi:
    """Returns the API at `url`, without credentials, or the one of the pod or of the kubeconfig. Raises: StartupError.

    namespace: empty for the pod's own, or the kubeconfig's.
    """
    try:
        from kubernetes.client import ApiClient, Configuration
    except ImportError as error:
        raise StartupError(
            f"NGD_DISPATCHER=kuberay needs the extra kuberay, {error.name} is missing; "
            "pip install 'ngd-service[kuberay]'"
        ) from error
    configuration = Configuration()
    default_namespace = _configure(configuration, url)
    configuration.retries = False  # urllib3 would try again, and sleep as long as Retry-After says
    return RayJobApi(ApiClient(configuration), namespace or default_namespace or "default")


def _configure(configuration: "Configuration", url: str) -> str:
    """Fills in address and credentials. Returns the namespace that goes with them, if any."""
    from kubernetes import config

    if url:
        configuration.host = url.rstrip("/")
        return ""
    try:
        config.load_incluster_config(configuration)
        return OWN_NAMESPACE.read_text().strip() if OWN_NAMESPACE.exists() else ""
    except config.ConfigException:
        pass  # not in a pod
    try:
        config.load_kube_config(client_configuration=configuration)
        _, current = config.list_kube_config_contexts()
    except (config.ConfigException, OSError) as error:
        raise StartupError(
            f"no way to Kubernetes: this is no pod with a service account, and the kubeconfig can't be used: {error}; "
            "set NGD_KUBERNETES_URL or KUBECONFIG"
        ) from error
    return str(current["context"].get("namespace") or "")


def _message(error: "ApiException") -> tuple[str, str]:
    """Returns the API server's word for the fault, and its sentence in one line."""
    try:
        status = json.loads(error.body or "")
        reason, said = str(status.get("reason")), status["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        reason, said = "", error.body or error.reason or "no reason given"
    return reason, " ".join(str(said).split())[:500]

"""The API server that the dispatcher is tested against keeps to what Kubernetes promises its clients."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.fakes.kube.cluster import TEMPLATE, KubeCluster


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeCluster]:
    """Alone, without an operator."""
    cluster = KubeCluster(tmp_path_factory.mktemp("kubernetes"), history=3)
    cluster.start_server()
    yield cluster
    cluster.stop()


def named(name: str, **labels: str) -> dict[str, Any]:
    content = copy.deepcopy(TEMPLATE)
    content["metadata"] = {"name": name, "labels": labels}
    return content


def create(server: KubeCluster, name: str, **labels: str) -> dict[str, Any]:
    return dict(server.http.post(server.collection, json=named(name, **labels)).raise_for_status().json())


def put(server: KubeCluster, content: dict[str, Any], subresource: str = "") -> httpx.Response:
    return server.http.put(f"{server.collection}/{content['metadata']['name']}{subresource}", json=content)


def watch(server: KubeCluster, version: str, timeout_s: int = 0) -> list[tuple[str, str]]:
    query = {"watch": "1", "resourceVersion": version, "timeoutSeconds": timeout_s}
    lines = server.http.get(server.collection, params=query).text.splitlines()
    events = [json.loads(line) for line in lines]
    return [(event["type"], event["object"].get("metadata", {}).get("name", "")) for event in events]


def test_name_is_taken_once(server: KubeCluster) -> None:
    create(server, "once")

    again = server.http.post(server.collection, json=named("once"))

    assert (again.status_code, again.json()["reason"]) == (409, "AlreadyExists")
    assert (again.json()["kind"], again.json()["apiVersion"], again.json()["status"]) == ("Status", "v1", "Failure")


def test_write_over_an_old_version_is_refused(server: KubeCluster) -> None:
    old = create(server, "versions")
    assert put(server, old | {"spec": old["spec"] | {"entrypoint": "true"}}).json()["metadata"]["generation"] == 2

    answer = put(server, old)

    assert (answer.status_code, answer.json()["reason"]) == (409, "Conflict")


def test_status_and_spec_are_written_apart(server: KubeCluster) -> None:
    made = create(server, "apart")
    told = put(server, made | {"spec": {}, "status": {"jobStatus": "RUNNING"}}, "/status").json()
    assert (told["spec"], told["status"]) == (made["spec"], {"jobStatus": "RUNNING"})

    told = put(server, told | {"status": {"jobStatus": "FAILED"}}).json()

    assert told["status"] == {"jobStatus": "RUNNING"}


def test_unknown_field_is_dropped_or_refused_and_wrong_type_is_refused(server: KubeCluster) -> None:
    content = named("fields")
    content["spec"]["entryPoint"] = "true"
    strict = server.http.post(server.collection, json=content, params={"fieldValidation": "Strict"})
    assert (strict.status_code, strict.json()["reason"]) == (400, "BadRequest")
    assert 'unknown field "spec.entryPoint"' in strict.json()["message"]
    assert "entryPoint" not in server.http.post(server.collection, json=content).raise_for_status().json()["spec"]

    wrong = named("wrong")
    wrong["spec"]["backoffLimit"] = "none"
    refused = server.http.post(server.collection, json=wrong)

    assert (refused.status_code, refused.json()["reason"]) == (422, "Invalid")
    assert refused.json()["details"]["causes"][0]["field"] == "spec.backoffLimit"


def test_object_with_a_finalizer_is_deleted_when_the_finalizer_goes(server: KubeCluster) -> None:
    made = create(server, "final")
    made = put(server, made | {"metadata": made["metadata"] | {"finalizers": ["ray.io/rayjob-finalizer"]}}).json()
    path = f"{server.collection}/final"
    wrong = server.http.request("DELETE", path, json={"preconditions": {"uid": "another"}})
    assert wrong.status_code == 409
    server.http.request("DELETE", path, json={"propagationPolicy": "Foreground"}).raise_for_status()

    left = server.http.get(path).json()
    assert left["metadata"]["deletionTimestamp"]
    assert left["metadata"]["finalizers"] == ["ray.io/rayjob-finalizer", "foregroundDeletion"]
    put(server, left | {"metadata": left["metadata"] | {"finalizers": []}}).raise_for_status()

    assert server.http.get(path).json()["reason"] == "NotFound"


def test_watch_tells_what_happened_since_and_that_it_has_forgotten(server: KubeCluster) -> None:
    before = server.http.get(server.collection).json()["metadata"]["resourceVersion"]
    made = create(server, "watched")
    server.http.delete(f"{server.collection}/watched").raise_for_status()
    assert watch(server, before) == [("ADDED", "watched"), ("DELETED", "watched")]
    for number in range(3):
        create(server, f"more-{number}")

    assert watch(server, before) == [("ERROR", "")]
    assert watch(server, made["metadata"]["resourceVersion"])[0][0] in ("ERROR", "DELETED")


def test_labels_select(server: KubeCluster) -> None:
    create(server, "red", colour="red")
    create(server, "blue", colour="blue")

    def names(selector: str) -> list[str]:
        items = server.http.get(server.collection, params={"labelSelector": selector}).json()["items"]
        return [item["metadata"]["name"] for item in items if item["metadata"]["name"] in ("red", "blue")]

    assert names("colour=red") == ["red"]
    assert names("colour,colour!=red") == ["blue"]
    assert names("!colour") == []


def test_objects_outlive_the_server_and_strangers_are_refused(server: KubeCluster) -> None:
    made = create(server, "stays")
    server.stop_server()
    server.start_server()

    assert server.http.get(f"{server.collection}/stays").json() == made
    stranger = httpx.get(server.url + server.collection)
    assert (stranger.status_code, stranger.json()["reason"]) == (401, "Unauthorized")


def test_answer_is_lost_after_the_deed(server: KubeCluster) -> None:
    server.misbehave({"method": "POST", "kind": "lose_answer"})
    with pytest.raises(httpx.TransportError):
        create(server, "lost")

    assert server.http.get(f"{server.collection}/lost").is_success


def test_deletion_that_waits_for_pods_goes_on_without_them_when_told_so(server: KubeCluster) -> None:
    made = create(server, "waits-for-pods")
    put(server, made | {"metadata": made["metadata"] | {"finalizers": ["ray.io/rayjob-finalizer"]}}).raise_for_status()
    path = f"{server.collection}/waits-for-pods"
    waits = server.http.request("DELETE", path, json={"propagationPolicy": "Foreground"}).json()

    goes_on = server.http.request("DELETE", path, json={"propagationPolicy": "Background"}).json()

    assert waits["metadata"]["finalizers"] == ["ray.io/rayjob-finalizer", "foregroundDeletion"]
    assert goes_on["metadata"]["finalizers"] == ["ray.io/rayjob-finalizer"]
    assert goes_on["metadata"]["deletionTimestamp"] == waits["metadata"]["deletionTimestamp"]


def test_quota_refuses_the_next_one_before_its_name_is_looked_at(server: KubeCluster) -> None:
    create(server, "within")
    server.limit_rayjobs(1)

    refused = [server.http.post(server.collection, json=named(name)).json() for name in ("beyond", "within")]
    server.limit_rayjobs(None)

    for answer in refused:
        assert (answer["code"], answer["reason"]) == (403, "Forbidden")
        assert (
            "exceeded quota: few, requested: count/rayjobs.ray.io=1, used: count/rayjobs.ray.io=" in answer["message"]
        )
    create(server, "beyond")

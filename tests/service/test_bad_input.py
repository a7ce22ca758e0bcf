"""Bad input gets one problem that says what, the value, the bound and what to do; nothing is created."""

import functools
import json
from typing import Any
from urllib.parse import unquote

import pytest

from ngd_service.client.client import Client, InvalidRequestError, NotFoundError
from ngd_service.resources import Problem, ProblemItem
from tests.support.attempts import small_spec

GOOD = small_spec(name="steps").model_dump(mode="json")


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good job with one place changed; None: taken out."""
    spec: dict[str, Any] = json.loads(json.dumps(small_spec().model_dump(mode="json")))
    *parents, last = path.split(".")
    place = spec
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return spec


def refusal(client: Client, spec: Any) -> Problem:
    before = [job.id for job in client.list_jobs(page_size=1000).jobs]
    with pytest.raises(InvalidRequestError) as caught:
        client.submit(spec)
    assert [job.id for job in client.list_jobs(page_size=1000).jobs] == before
    assert "Traceback" not in str(caught.value)
    return caught.value.problem


def only_item(client: Client, spec: Any) -> ProblemItem:
    problem = refusal(client, spec)
    assert (problem.status, problem.code) == (422, "invalid_spec")
    (item,) = problem.errors
    return item


NGD = {"kind": "ngd"}
FUNCTION = {"kind": "function", "function": "package.module:make"}
NESTED: Any = functools.reduce(lambda inner, _: [inner], range(400), 0)


@pytest.mark.parametrize(
    ("path", "value", "pointer", "code", "rule"),
    [
        ("modle", {}, "/modle", "unknown_field", "a job has no field 'modle'"),
        ("batch.global_siz", 8, "/batch/global_siz", "unknown_field", "batch has no field 'global_siz'"),
        ("model", {"kind": "small_cn"}, "/model/kind", "unknown_kind",
         'must be one of small_cnn, mlp, gpt, encoder_decoder, torchvision, timm, transformers, function, '
         'got "small_cn"'),
        ("model", {"hidden": [3]}, "/model/kind", "missing", "is missing"),
        ("model", {"kind": "mlp", "hidden": [0]}, "/model/hidden/0", "out_of_range", "must be >= 1, got 0"),
        ("model", {"kind": "function", "function": "nothing"}, "/model/function", "invalid_choice",
         'must match ^[A-Za-z_][\\w.]*:[A-Za-z_]\\w*$, got "nothing"'),
        ("optimizer", NGD | {"damping": 0}, "/optimizer/damping", "out_of_range", "must be > 0, got 0"),
        ("optimizer", NGD | {"lr": "fast"}, "/optimizer/lr", "wrong_type", 'must be a number, got "fast"'),
        ("optimizer", NGD | {"staleness": {"kind": "fixed", "steps": 0}}, "/optimizer/staleness/steps", "out_of_range",
         "must be >= 1, got 0"),
        ("optimizer", NGD | {"micro_batches": 2}, "/optimizer", "invalid",
         "optimizer: micro_batches and loss_reduction follow from batch.global_size and batch.micro_size in a job; "
         "leave them out of optimizer"),
        ("batch.global_size", "many", "/batch/global_size", "wrong_type", 'must be a whole number, got "many"'),
        ("batch.global_size", 2.5, "/batch/global_size", "wrong_type", "must be a whole number, got 2.5"),
        ("batch", 7, "/batch", "wrong_type", "must be an object of fields, got 7"),
        ("resources", {"workers": 3}, "", "invalid",
         "batch.global_size must be a multiple of resources.workers (3), got 64; the nearest are 63 and 66"),
        ("batch.micro_size", 7, "", "invalid",
         "batch.micro_size must divide a worker's share, 64 (= batch.global_size 64 / resources.workers 1), got 7"),
        ("name", "No Name", "/name", "invalid_choice",
         'must match ^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$, got "No Name"'),
        ("name", None, "/name", "missing", "is missing"),
        ("schedule", {}, "/schedule", "invalid",
         "schedule: give exactly one of epochs and steps, got epochs=None and steps=None"),
        ("schedule", {"epochs": True}, "/schedule/epochs", "wrong_type", "must be a whole number, got true"),
        ("batch.global_size", "64", "/batch/global_size", "wrong_type", 'must be a whole number, got "64"'),
        ("optimizer", NGD | {"staleness": {"kind": "adaptive", "thresholds": {"A": "1"}}},
         "/optimizer/staleness/thresholds/A", "wrong_type", 'must be a number, got "1"'),
        ("model", {"kind": "mlp", "hidden": [True]}, "/model/hidden/0", "wrong_type",
         "must be a whole number, got true"),
        ("model", FUNCTION | {"options": {"a": [float("nan")]}}, "/model/options", "invalid",
         "model.options: options.a[0] must be a finite number, got nan"),
        ("model", FUNCTION | {"options": {"a": "\ud800"}}, "/model/options", "invalid",
         "model.options: options.a must be valid Unicode, got '\\ud800'"),
        ("model", FUNCTION | {"options": {"\ud800": 1}}, "/model/options", "invalid",
         "model.options: a name in options must be valid Unicode, got '\\ud800'"),
        ("data", FUNCTION | {"options": {"a": NESTED}}, "/data/options", "invalid",
         "data.options: values may lie 16 levels deep, and one lies deeper; flatten them"),
        ("model", FUNCTION | {"options": {"a": 2**63}}, "/model/options", "invalid",
         "model.options: options.a must fit in 64 bits; give it as a text"),
        ("optimizer", NGD | {"strategy": {"kind": "single"}}, "", "invalid",
         "optimizer.strategy single takes resources.workers 1, got 2; take owner_sharded or all_reduce, or leave "
         "optimizer.strategy out"),
        ("target", {"metric": "accuracy", "value": "1"}, "/target/value", "wrong_type", 'must be a number, got "1"'),
        ("target", {"test_accuracy": "0.9"}, "/target/value", "wrong_type", 'must be a number, got "0.9"'),
        ("target", {"value": 0.9}, "/target/metric", "missing", "is missing"),
    ],
)  # fmt: skip
def test_wrong_field_is_named_with_its_bound_and_value(
    client: Client, path: str, value: Any, pointer: str, code: str, rule: str
) -> None:
    spec = changed(path, value)
    if "strategy" in str(value):
        spec["resources"]["workers"] = 2
    item = only_item(client, json.dumps(spec))

    name = pointer.strip("/").replace("/", ".")
    assert (item.pointer, item.code) == (pointer, code)
    assert item.detail == (f"{name} {rule}" if rule.startswith(("must", "is missing")) else rule)


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("modle", {}, "did you mean 'model'?"),
        ("model", {"kind": "small_cn"}, "did you mean 'small_cnn'?"),
        ("optimizer", NGD | {"dampign": 1}, "did you mean 'damping'?"),
        ("optimizer", NGD | {"damping": 0}, "The default is 0.1."),
        ("batch.zzz", 1, "its fields are global_size, micro_size"),
        ("model", "mlp", "write {kind: mlp}"),
    ],
)
def test_hint_says_what_to_do(client: Client, path: str, value: Any, hint: str) -> None:
    assert hint in (only_item(client, changed(path, value)).hint or "")


def test_all_that_is_wrong_is_said_at_once(client: Client) -> None:
    spec = changed("batch.global_size", 0) | {"name": "", "seed": -1}

    assert {item.pointer for item in refusal(client, spec).errors} == {"/batch/global_size", "/name", "/seed"}


@pytest.mark.parametrize(
    ("body", "media_type", "status", "code", "detail"),
    [
        (b"{", "application/json", 400, "malformed_body", "the body is no JSON"),
        (b"\xff", "application/json", 400, "malformed_body", "the body is no JSON"),
        (b"[" * 100_000, "application/json", 400, "malformed_body", "the body is no JSON"),
        (b"a: [1, ]]", "application/yaml", 400, "malformed_body", "line 1"),
        (b"a: &x 1\nb: *x", "application/yaml", 400, "malformed_body", "aliases"),
        (b"[]", "application/json", 422, "invalid_spec", "must be an object of fields, got []"),
        (b"", "application/yaml", 422, "invalid_spec", "got null"),
        (b"{}", "text/plain", 415, "unsupported_media_type", "'text/plain'"),
        (b'{"seed": NaN}', "application/json", 422, "invalid_spec", "seed"),
        (b'{"\\ud800": 1}', "application/json", 422, "invalid_spec", "a job must be valid Unicode"),
        (b'{"name": "\\ud800"}', "application/json", 422, "invalid_spec", "name must be valid Unicode"),
        (b'{"seed": ' + b"[" * 400 + b"]" * 400 + b"}", "application/json", 422, "invalid_spec", "seed must be"),
        (b"name: !!binary YWJj", "application/yaml", 400, "malformed_body", "the tag 'tag:yaml.org,2002:binary'"),
        (b"seed: 0x" + b"f" * 5000, "application/yaml", 422, "invalid_spec", "seed must be"),
        (b"? [a]\n: 1", "application/yaml", 400, "malformed_body", "can't be a name; write a text at line 1"),
        (b"1: 2", "application/yaml", 422, "invalid_spec", "1 must be a text, got 1"),
        (b"name: 2020-99-99", "application/yaml", 422, "invalid_spec", "model is missing"),
        (b"schedule: {steps: 190:20:30}", "application/yaml", 422, "invalid_spec", 'whole number, got "190:20:30"'),
        (b"seed: 1\nseed: 2", "application/yaml", 400, "malformed_body", "'seed' stands twice in one object"),
        (b'{"seed": 1,\n"seed": 2}', "application/json", 400, "malformed_body", "leave one out at line 2"),
        (b"#" * (64 << 10) + b"#", "application/yaml", 413, "body_too_large", "65,537 bytes, and YAML is read up to"),
        (b'{"seed": [' + b"1," * 10_000 + b"1]}", "application/json", 422, "invalid_spec", "may hold 10,000 values"),
        (b"\xff", "application/yaml", 400, "malformed_body", "unacceptable character"),
        (b" " * (1 << 20) + b"{}", "application/json", 413, "body_too_large", "1 MiB"),
    ],
)
def test_body_that_is_no_job_is_refused(
    client: Client, body: bytes, media_type: str, status: int, code: str, detail: str
) -> None:
    answer = client._http.post("/api/v1/jobs", content=body, headers={"Content-Type": media_type})

    problem = Problem.model_validate_json(answer.content)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem.status, problem.code) == (status, status, code)
    assert detail in problem.detail


def test_body_without_a_type_is_refused(client: Client) -> None:
    answer = client._http.post("/api/v1/jobs", content=json.dumps(GOOD).encode())

    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/api/v1/jobs/job_none", 404, "not_found"),
        ("POST", "/api/v1/jobs/job_none:cancel", 404, "not_found"),
        ("GET", "/api/v1/jobs/job_none/events", 404, "not_found"),
        ("GET", "/api/v1/jobs/job_none/events/stream", 404, "not_found"),
        ("GET", "/api/v1/jobs/job_none/metrics", 404, "not_found"),
        ("GET", "/api/v1/jobs/job_none/statistics", 404, "not_found"),
        ("GET", "/api/v1/jobs/job_none/logs", 404, "not_found"),
        ("GET", "/api/v1/nothing", 404, "not_found"),
        ("DELETE", "/api/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/api/v1/jobs?page_size=0", 422, "invalid_parameter"),
        ("GET", "/api/v1/jobs?phase=RUNING", 422, "invalid_parameter"),
        ("GET", "/api/v1/jobs?page_token=abc", 400, "page_token_mismatch"),
        ("GET", "/api/v1/jobs?page_token=%C3%A9", 400, "page_token_mismatch"),
        ("GET", "/api/v1/jobs/job_none?wait_for=ever", 422, "invalid_parameter"),
        ("GET", f"/api/v1/jobs/job_none/events?after={2**63}", 422, "invalid_parameter"),
        ("GET", f"/api/v1/jobs/job_none/events/stream?after={2**63}", 422, "invalid_parameter"),
        ("GET", f"/api/v1/jobs/job_none/metrics?from_step={2**63}", 422, "invalid_parameter"),
        ("GET", f"/api/v1/jobs/job_none/statistics?from_step={2**63}", 422, "invalid_parameter"),
        ("GET", "/api/v1/jobs/job_none/statistics?span=0", 422, "invalid_parameter"),
        ("GET", "/api/v1/jobs/job_none/statistics?max_points=1001", 422, "invalid_parameter"),
        ("GET", "/api/v1/jobs/job_none/events?newest_of=%00", 422, "invalid_parameter"),
        ("GET", "/api/v1/jobs/job_%00", 422, "invalid_parameter"),
        ("POST", "/api/v1/internal/attempts/none-a1/events", 401, "unauthorized"),
    ],
)
def test_every_error_is_a_problem(client: Client, method: str, path: str, status: int, code: str) -> None:
    answer = client._http.request(method, path, headers={"X-Request-ID": "mine"})

    problem = Problem.model_validate_json(answer.content)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == problem.request_id == "mine"
    assert (answer.status_code, problem.status, problem.code) == (status, status, code)
    assert problem.instance == unquote(path.partition("?")[0])


def test_cursor_that_no_database_holds_is_refused(client: Client) -> None:
    answer = client._http.get("/api/v1/jobs/job_none/events/stream", headers={"Last-Event-ID": str(2**63)})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")


def test_unknown_parameter_is_refused_before_anything_is_created(client: Client) -> None:
    before = len(client.list_jobs(page_size=1000).jobs)

    answer = client._http.post("/api/v1/jobs?validate_onyl=true", json=GOOD)

    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {
            "pointer": "validate_onyl",
            "code": "unknown_parameter",
            "detail": "POST /api/v1/jobs has no parameter 'validate_onyl'",
            "hint": "did you mean 'validate_only'?",
        }
    ]
    assert len(client.list_jobs(page_size=1000).jobs) == before


def test_parameter_out_of_range_is_named(client: Client) -> None:
    answer = client._http.get("/api/v1/jobs", params={"page_size": "0"})

    assert answer.json()["errors"][0] == {
        "pointer": "page_size",
        "code": "out_of_range",
        "detail": 'page_size must be >= 1, got "0"',
        "hint": None,
    }


def test_page_token_of_another_filter_is_refused(client: Client) -> None:
    for _ in range(2):
        client.cancel(client.submit(GOOD).id)
    token = client.list_jobs(page_size=1).next_page_token

    with pytest.raises(InvalidRequestError, match="other filters"):
        client.list_jobs(page_size=1, page_token=token, phase="FAILED")


def test_idempotency_key_with_another_body_is_refused(client: Client) -> None:
    client.submit(GOOD, idempotency_key="key-of-bad-input")

    with pytest.raises(InvalidRequestError, match="'key-of-bad-input'"):
        client.submit(GOOD | {"seed": 5}, idempotency_key="key-of-bad-input")


def test_check_without_creating_gives_the_whole_spec(client: Client) -> None:
    before = len(client.list_jobs(page_size=1000).jobs)

    checked = client.validate("name: small\nmodel: {kind: mlp}\ndata: {kind: digits}\noptimizer: {kind: ngd}\n"
                              "schedule: {epochs: 1}\nbatch: {global_size: 32}\n")  # fmt: skip

    assert checked.spec["optimizer"]["damping"] == 0.1
    assert len(client.list_jobs(page_size=1000).jobs) == before


def test_unknown_job_is_not_found_by_the_client(client: Client) -> None:
    with pytest.raises(NotFoundError, match="'job_none'"):
        client.get("job_none")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example:8000"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "["},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:3000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://localhost:8000"},
        {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1"},
    ],
)
def test_web_page_of_another_site_is_refused(client: Client, headers: dict[str, str]) -> None:
    answer = client._http.post("/api/v1/jobs/job_none:cancel", headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_page")


def test_page_of_this_machine_is_served(client: Client) -> None:
    headers = {"Host": "localhost:8000", "Origin": "http://localhost:8000"}

    assert client._http.get("/api/v1/jobs", headers=headers).status_code == 200

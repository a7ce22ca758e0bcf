"""What the clients make of an answer, and what they raise.

The error tree:

    ServiceError
        ServiceUnreachableError        nothing answers at the address
        NotThisServiceError            something else answers there
        InvalidKeyError                what was given as an API key can't be one
        RequestRefusedError            the service answered with a problem
            InvalidRequestError        400, 413, 415, 422: change the request
            UnauthorizedError          401: no API key, or none of this service's
            NotFoundError              404
            ConflictError              409: not in the job's present state
            ServiceFailedError         5xx: the service's own trouble
"""

import ipaddress
from typing import TypeVar

import httpx
from pydantic import ValidationError

from ngd_service.client.endpoints import Endpoint
from ngd_service.resources import Problem

__all__ = [
    "DEFAULT_URL",
    "ConflictError",
    "InvalidKeyError",
    "InvalidRequestError",
    "NotFoundError",
    "NotThisServiceError",
    "RequestRefusedError",
    "ServiceError",
    "ServiceFailedError",
    "ServiceUnreachableError",
    "UnauthorizedError",
    "address",
    "authorization",
    "check_answer",
    "may_have_arrived",
    "not_this_service",
    "read_answer",
    "request_of",
    "unknown_whether_created",
    "unreachable",
    "uses_proxies",
]

Answer = TypeVar("Answer")
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0


class ServiceError(Exception):
    """Base of what the client raises."""


class ServiceUnreachableError(ServiceError, ConnectionError):
    """Nothing answers at the address."""


class NotThisServiceError(ServiceError):
    """What answers at the address is something else."""


class InvalidKeyError(ServiceError, ValueError):
    """What was given as an API key can't be one."""


class RequestRefusedError(ServiceError):
    """The service answered with a problem; `problem` is the whole of it, str() the text for a person."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        lines = [f"{item.detail}" + (f" ({item.hint})" if item.hint else "") for item in problem.errors]
        super().__init__("\n".join(lines or [problem.detail]))


class InvalidRequestError(RequestRefusedError, ValueError):
    """The request itself is wrong: change it."""


class UnauthorizedError(RequestRefusedError, PermissionError):
    """The service wants an API key, or another one."""


class NotFoundError(RequestRefusedError, LookupError):
    """There is no such job or route."""


class ConflictError(RequestRefusedError):
    """Not possible in the job's present state."""


class ServiceFailedError(RequestRefusedError):
    """The service's own trouble; `problem.retryable` says whether to try again."""


def address(given: str) -> httpx.URL:
    """Returns the address of a service. Raises: ServiceUnreachableError for what is no address."""
    try:
        url = httpx.URL(given)
        is_address = url.scheme in ("http", "https") and bool(url.host)
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise ServiceUnreachableError(f"{given!r} is no address of a service; give one such as {DEFAULT_URL}")
    return url


def uses_proxies(url: httpx.URL) -> bool:
    """Returns whether http_proxy and its like count: a proxy elsewhere can't reach this machine's own addresses."""
    try:
        return not (url.host == "localhost" or ipaddress.ip_address(url.host).is_loopback)
    except ValueError:
        return True


def authorization(key: str | None) -> dict[str, str]:
    """Returns the header that carries the key. Raises: InvalidKeyError for what no header carries."""
    if key is None:
        return {}
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InvalidKeyError("the API key must be visible ASCII characters; check that the whole of it was given")
    return {"Authorization": f"Bearer {key}"}


def refused(response: httpx.Response) -> RequestRefusedError:
    """Returns the error for an answer with a status of 400 or more."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        detail = f"{response.request.url} answered {response.status_code} and is not this service"
        problem = Problem(
            type="about:blank",
            title=response.reason_phrase,
            status=response.status_code,
            detail=detail,
            instance=response.request.url.path,
            code="not_this_service",
            request_id="",
            retryable=False,
        )
    kinds = {401: UnauthorizedError, 404: NotFoundError, 409: ConflictError}
    default = ServiceFailedError if response.status_code >= 500 else InvalidRequestError
    return kinds.get(response.status_code, default)(problem)


def not_this_service(response: httpx.Response) -> NotThisServiceError:
    """Returns the error for an answer that no ngd service gives."""
    return NotThisServiceError(
        f"what answers at {response.request.url} is not an ngd service; give the service's address with --url, or set "
        "NGD_HOST and NGD_PORT"
    )


def unreachable(base_url: httpx.URL, error: httpx.RequestError) -> ServiceUnreachableError:
    """Returns the error for a request that got no answer."""
    reason = str(error) or type(error).__name__
    return ServiceUnreachableError(f"no service answers at {base_url} ({reason}); start one with: ngd serve")


def request_of(client: httpx.AsyncClient, endpoint: Endpoint[Answer]) -> httpx.Request:
    """Returns the request of a call, not sent yet. An endpoint without a timeout gets TIMEOUT_S."""
    return client.build_request(
        endpoint.method,
        endpoint.path,
        params=endpoint.params,
        headers=endpoint.headers,
        json=endpoint.json,
        content=endpoint.content,
        timeout=endpoint.timeout_s or TIMEOUT_S,
    )


def read_answer(response: httpx.Response, endpoint: Endpoint[Answer]) -> Answer:
    """Returns the answer of a call. Raises: RequestRefusedError, NotThisServiceError."""
    check_answer(response)
    try:
        return endpoint.read(response.content)
    except ValidationError as error:
        raise not_this_service(response) from error


def check_answer(response: httpx.Response) -> None:
    """Raises: RequestRefusedError, NotThisServiceError, if the answer is no success."""
    if response.status_code >= 400:
        raise refused(response)
    if not response.is_success:
        raise not_this_service(response)


def may_have_arrived(error: ServiceError) -> bool:
    """Returns whether the same request may have been carried out, or may be yet, though no answer says so."""
    if isinstance(error, ServiceFailedError):
        return error.problem.retryable
    never_sent = httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol
    return isinstance(error, ServiceUnreachableError) and not isinstance(error.__cause__, never_sent)


def unknown_whether_created(error: ServiceError, key: str) -> ServiceError:
    """Returns the error with what makes the request safe to repeat."""
    if not isinstance(error, ServiceUnreachableError):
        return error
    return ServiceUnreachableError(
        f"{error}; the job may have been created all the same: submit it again with --idempotency-key {key}, which "
        "makes no second one"
    )

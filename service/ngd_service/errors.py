"""What can go wrong with a request or at the start, and its one mapping to problem+json.

StartupError                        the service can't start: one sentence, exit code 2
ProblemError                        an answer with a status of 4xx or 5xx
    MalformedBodyError      400     the body is no JSON or YAML
    PageTokenError          400     a page token of another list, or altered
    UnauthorizedError       401     no attempt's token, or another attempt's
    ForeignPageError        403     a page of another site, or another name for this machine
    NotFoundError           404     no such job or attempt
    StaleAttemptError       409     a later attempt has taken over
    BodyTooLargeError       413     more than MAX_BODY_BYTES
    UnsupportedMediaError   415     neither JSON nor YAML
    RangeError              416     bytes that a log does not have, or no more
    InvalidSpecError        422     the body is read, but is no job
    ArchiveDiffersError     422     the body is not the archive that the address names
    InvalidParameterError   422     a parameter of the path, the query or a header
    IdempotencyError        422     the key was used with another body
    StoreUnavailableError   503     the database does not answer
    StorageUnavailableError 503     the volume of runs can't be used
    StorageFullError        507     the volume of runs is full
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from ngd_service.resources import Problem, ProblemItem

__all__ = ["MAX_BODY_BYTES", "ProblemError", "StartupError", "as_problem", "problem_of_status"]

MAX_BODY_BYTES = 1 << 20


class StartupError(Exception):
    """The service can't start; str() is one sentence: the problem, the value and the remedy."""

    exit_code = 2


class ProblemError(Exception):
    """An answer other than the one asked for; its detail is safe to show."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "internal"
    retryable = False
    headers: Mapping[str, str] = {}

    def __init__(self, detail: str, errors: Sequence[ProblemItem] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)


class MalformedBodyError(ProblemError, ValueError):
    """The body can't be read as its Content-Type says."""

    status, code = HTTPStatus.BAD_REQUEST, "malformed_body"


class PageTokenError(ProblemError, ValueError):
    """The page token is not one of this service's, or belongs to a list with other filters."""

    status, code = HTTPStatus.BAD_REQUEST, "page_token_mismatch"


class UnauthorizedError(ProblemError, PermissionError):
    """The request carries no valid key, session or token of an attempt."""

    status, code = HTTPStatus.UNAUTHORIZED, "unauthorized"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class ForeignPageError(ProblemError, PermissionError):
    """A page of another origin made a browser send the request."""

    status, code = HTTPStatus.FORBIDDEN, "foreign_page"


class NotFoundError(ProblemError, LookupError):
    """There is no such job, attempt or rank."""

    status, code = HTTPStatus.NOT_FOUND, "not_found"


class StaleAttemptError(ProblemError):
    """The attempt has ended; its reports no longer count."""

    status, code = HTTPStatus.CONFLICT, "stale_attempt"


class BodyTooLargeError(ProblemError, ValueError):
    """The body has more than MAX_BODY_BYTES."""

    status, code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large"


class UnsupportedMediaError(ProblemError, ValueError):
    """The path does not read this Content-Type."""

    status, code = HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"


class RangeError(ProblemError, ValueError):
    """The Range begins outside of the kept part of a log. size: of the log, in bytes."""

    status, code = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "range_not_satisfiable"

    def __init__(self, detail: str, size: int) -> None:
        super().__init__(detail)
        self.headers = {"Content-Range": f"bytes */{size}"}


class InvalidSpecError(ProblemError, ValueError):
    """The spec breaks a rule; `errors` lists each problem."""

    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_spec"


class ArchiveDiffersError(ProblemError, ValueError):
    """The archive of code is not the one that its address names: it is cut short, or another one."""

    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "archive_differs"


class InvalidParameterError(ProblemError, ValueError):
    """A query parameter or a header breaks a rule."""

    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_parameter"


class IdempotencyError(ProblemError, ValueError):
    """The Idempotency-Key came before with another request."""

    status, code = HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_key_reused"


class StoreUnavailableError(ProblemError):
    """The database does not answer; the same request may succeed later."""

    status, code, retryable = HTTPStatus.SERVICE_UNAVAILABLE, "store_unavailable", True
    headers: Mapping[str, str] = {"Retry-After": "1"}


class StorageUnavailableError(ProblemError):
    """The volume of runs can't be read or written; the same request may succeed later."""

    status, code, retryable = HTTPStatus.SERVICE_UNAVAILABLE, "storage_unavailable", True
    headers: Mapping[str, str] = {"Retry-After": "1"}


class StorageFullError(ProblemError):
    """The volume of runs has no room for what was sent."""

    status, code = HTTPStatus.INSUFFICIENT_STORAGE, "storage_full"


def as_problem(error: ProblemError, *, instance: str, request_id: str) -> Problem:
    """Returns the body of the answer to a request that failed with `error`."""
    return Problem(
        type=f"urn:ngd:problem:{error.code}",
        title=error.status.phrase,
        status=error.status,
        detail=error.detail,
        instance=instance,
        code=error.code,
        errors=error.errors,
        request_id=request_id,
        retryable=error.retryable,
    )


def problem_of_status(status: HTTPStatus, detail: str) -> ProblemError:
    """Returns the error for a status that the framework chose by itself (no such route, wrong method ...)."""
    error = ProblemError(detail)
    error.status, error.code = status, status.name.lower()
    return error

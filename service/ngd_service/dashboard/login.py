"""The login page: an API key for a session. Plain HTML, for NiceGUI's own pages are for those who are logged in."""

import html
import logging
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from ngd_service.auth.access import LOGIN, LOGOUT, SESSION_COOKIE, SESSION_S, Access
from ngd_service.dashboard.plain import plain_page
from ngd_service.errors import MalformedBodyError

__all__ = ["login_routes"]

log = logging.getLogger(__name__)

MAX_FIELDS = 8
REFUSED = "This is not an API key of this service. Whoever runs it gives them out; the whole key is one line of a file."
FORM = """<h1>Log in</h1>
<form method="post" action="{action}">
<input type="hidden" name="next" value="{wanted}">
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus {described}>
{refused}
<button type="submit">Log in</button>
</form>"""


def login_routes(access: Access, *, is_secure: bool) -> APIRouter:
    """Returns the routes of /login and /logout. is_secure: browsers reach the service by https alone."""
    router = APIRouter(include_in_schema=False)

    @router.get(LOGIN)
    async def show(request: Request) -> Response:
        wanted = _local(request.query_params.get("next", ""))
        if access.key_owner(None, request.headers.get("cookie")):
            return RedirectResponse(wanted, 303)
        return _page(wanted)

    @router.post(LOGIN)
    async def log_in(request: Request) -> Response:
        body = (await request.body()).decode("utf-8", errors="replace")
        try:
            form = parse_qs(body, max_num_fields=MAX_FIELDS)
        except ValueError as error:
            raise MalformedBodyError(f"the login form has two fields, key and next, got over {MAX_FIELDS}") from error
        wanted = _local(form.get("next", [""])[0])
        opened = access.session(form.get("key", [""])[0].strip())
        where = request.client.host if request.client else "?"
        if opened is None:
            log.warning("login_refused address=%s", where)
            return _page(wanted, refused=True)
        key_owner, session = opened
        log.info("login holder=%s address=%s", key_owner, where)
        answer = RedirectResponse(wanted, 303)
        answer.set_cookie(
            SESSION_COOKIE, session, max_age=SESSION_S, path="/", httponly=True, samesite="lax", secure=is_secure
        )
        return answer

    @router.post(LOGOUT)
    async def log_out() -> Response:
        answer = RedirectResponse(LOGIN, 303)
        answer.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="lax", secure=is_secure)
        return answer

    return router


def _local(wanted: str) -> str:
    """Returns the page to go to: one of this service's, whatever a link to the login page says."""
    is_local = wanted.startswith("/") and not wanted.startswith(("//", "/\\")) and wanted.isprintable()
    return wanted if is_local else "/"


def _page(wanted: str, *, refused: bool = False) -> HTMLResponse:
    form = FORM.format(
        action=LOGIN,
        wanted=html.escape(wanted, quote=True),
        described='aria-invalid="true" aria-describedby="refused"' if refused else "",
        refused=f'<p id="refused" role="alert">{REFUSED}</p>' if refused else "",
    )
    return plain_page("Log in", form, 401 if refused else 200)

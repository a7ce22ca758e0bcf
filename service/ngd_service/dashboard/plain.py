"""Pages of plain HTML in the dashboard's style, for readers who get none of NiceGUI's."""

import asyncio
import html
from collections.abc import Sequence

from fastapi.responses import HTMLResponse

from ngd_service.client.client import AsyncClient, NotFoundError
from ngd_service.dashboard.theme import CSS, MARK

__all__ = ["missing_page", "plain_page", "unknown", "unknown_jobs_page"]

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
DARK = "@media (prefers-color-scheme: dark) {{ {} }}"
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · ngd-dist</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body class="plain">
<main class="panel">
<div class="brand">{mark}ngd-dist</div>
{content}
</main>
</body>
</html>
"""
MISSING = """<h1>There is no such page</h1>
<p>The address is not one of this service's pages; a link may have lost its end.</p>
<p><a href="/">All jobs</a></p>"""
UNKNOWN = """<h1>There is no such job</h1>
<p>The service knows no job {named}.</p>
<p><a href="/">All jobs</a></p>"""


def plain_page(title: str, content: str, status: int = 200) -> HTMLResponse:
    """Returns a page of its own, without a script; content: HTML."""
    return HTMLResponse(PAGE.format(title=title, css=_style(), mark=MARK, content=content), status, HEADERS)


def missing_page() -> HTMLResponse:
    """Returns what stands at an address that is no page's."""
    return plain_page("Not found", MISSING, 404)


async def unknown(api: AsyncClient, job_ids: Sequence[str]) -> list[str]:
    """Returns those of the ids that are no job's."""
    answers = await asyncio.gather(*(api.get(job_id) for job_id in job_ids), return_exceptions=True)
    return [job_id for job_id, answer in zip(job_ids, answers, strict=True) if isinstance(answer, NotFoundError)]


def unknown_jobs_page(job_ids: Sequence[str]) -> HTMLResponse:
    """Returns what stands at the address of jobs that are not there."""
    named = html.escape(", ".join(job_ids))
    return plain_page("No such job", UNKNOWN.format(named=named), 404)


def _style() -> str:
    """Returns the pages' style; without a script the colours follow the system alone."""
    css = CSS.read_text()
    dark = css.partition("body.body--dark {")[2].partition("}")[0]
    return css + DARK.format(f"body {{{dark}}}")

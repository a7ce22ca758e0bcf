"""Pages of the service: its command, its HTTP interface, its settings, the events of a job, what Prometheus reads."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from click import Context
from model_tables import body, escaped
from typer.cli import get_docs_for_click
from typer.main import get_command

from ngd_service.cli.commands import app
from ngd_service.dispatchers import DISPATCHERS
from ngd_service.job_state import Phase
from ngd_service.monitoring.metrics import RESULTS, ControllerMetrics
from ngd_service.settings import ClientSettings, Settings
from ngd_service.store.base import JobCounts
from ngd_workers.contract.events import Event, Judged, Layers, Metric, Numbered, Ranks, StepRecord

__all__ = ["command", "events", "metrics", "rest", "settings"]

OPENAPI = Path(__file__).parents[1] / "openapi.json"
MADE = "<!-- Written by docs/reference/service_pages.py from the code: change it there. -->\n"
COMMAND = """# The command ngd

It talks to the service at `NGD_URL`, by default `http://127.0.0.1:8000`, with the key of `NGD_API_KEY` or of the file
`NGD_API_KEY_FILE`. `ngd train`, `ngd plan` and `ngd data` need no service. A failure that was to be expected is one
sentence on stderr and an exit status that is not 0.
"""
REST = """# REST

Base address: that of the service, such as `http://127.0.0.1:8000`. Where people have keys, each request bears one:
`Authorization: Bearer KEY`. Bodies are JSON. Errors are problem details (RFC 9457), `application/problem+json`, with
a sentence for a person in `detail`. The whole description, for generated clients, is [openapi.json](../openapi.json);
from Python there is [a client](client.md).

```sh
curl http://127.0.0.1:8000/api/v1/jobs -H "Authorization: Bearer $NGD_API_KEY"
```
"""
SETTINGS = """# Settings of the service

`ngd serve` reads each of these from the variable `NGD_` and its name in capitals: `NGD_MAX_RUNNING_JOBS=4 ngd serve`.
A value out of bounds, or a contradiction, ends it at the start with a sentence. The [chart](chart.md) sets them as
`settings`.
"""
EVENTS = """# Events of a job

Workers tell the service what happens by events: `GET /api/v1/jobs/JOB/events` lists them, and `.../events/stream`
sends them as they come. An event has an attempt and a number within it, `seq`; a repeated delivery changes nothing.
NaN and infinity travel as the texts "NaN", "Infinity" and "-Infinity".
"""
METRICS = """# Metrics for Prometheus

`GET /metrics` of each controller. Metrics of training, such as losses, are the job's: see [events](events.md). The
alerts on these, and what to do about each, are the [runbooks](../runbooks/index.md).

| metric | type | labels | meaning |
|---|---|---|---|
"""


def command() -> str:
    """Returns the page of the command line, as typer describes the program."""
    click = get_command(app)
    text = html.unescape(get_docs_for_click(obj=click, ctx=Context(click), name="ngd"))
    _, _, rest = text.partition("**Commands**:")
    return f"{MADE}{COMMAND}\n**Commands**:{without_html(rest)}"


def without_html(text: str) -> str:
    """Returns Markdown in which no HTML is read; its code, in lines or in blocks, stays as it is."""
    parts = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def rest() -> str:
    """Returns a section for each path and verb of docs/openapi.json."""
    api = json.loads(OPENAPI.read_text())
    sections = [f"{MADE}{REST}"]
    for path, verbs in api["paths"].items():
        if "/internal/" in path:
            continue
        for verb, operation in verbs.items():
            sections.append("\n".join(_operation(verb, path, operation, api)))
    return "\n".join(sections)


def _operation(verb: str, path: str, operation: dict[str, Any], api: dict[str, Any]) -> Iterator[str]:
    yield f"## {operation['summary']}\n"
    yield f"`{verb.upper()} {path}`\n"
    yield escaped(operation.get("description", "")) + "\n"
    if given := operation.get("parameters"):
        yield "| parameter | in | values | meaning |\n|---|---|---|---|"
        for one in given:
            schema = one["schema"]
            meaning = one.get("description") or schema.get("description", "")
            name = f"`{one['name']}`" + (", required" if one.get("required") else "")
            yield f"| {name} | {one['in']} | {_values(schema)} | {escaped(meaning)} |"
        yield ""
    if content := operation.get("requestBody", {}).get("content"):
        yield f"Body: {', '.join(f'`{kind}`' for kind in content)}.\n"
    answers = [f"`{status}` {answer['description'].rstrip('.')}" for status, answer in operation["responses"].items()
               if status != "default"]  # fmt: skip
    yield f"Answers: {'; '.join(answers)}.\n"


def _values(schema: dict[str, Any]) -> str:
    options = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    words = []
    for one in options:
        bounds = [
            f"&ge; {one['minimum']}" if "minimum" in one else "",
            f"&le; {one['maximum']}" if "maximum" in one else "",
        ]
        words.append(f"{one.get('type', 'one of several')} {', '.join(filter(None, bounds))}".strip())
    default = f", default {schema['default']}" if schema.get("default") is not None else ""
    return " or ".join(words) + default


def settings() -> str:
    """Returns the tables of the common settings, of each dispatcher's and of the client's."""
    parts = [f"{MADE}{SETTINGS}", "## Common\n", *body(Settings, hidden=["failpoint"])]
    for name, dispatcher in DISPATCHERS.items():
        if dispatcher.settings_class.model_fields:
            parts += [f"## With NGD_DISPATCHER={name}\n", *body(dispatcher.settings_class)]
    return "\n".join([*parts, "## Of the command ngd, and of the client\n", *body(ClientSettings)])


def events() -> str:
    """Returns a table for each kind of event."""
    parts = [f"{MADE}{EVENTS}", "## Every event\n", *body(Numbered)]
    for kind in get_args(get_args(Event)[0]):
        parts += [f"## {kind.__name__}\n", *body(kind)]
    for model in (StepRecord, Judged, Layers, Ranks, Metric):
        parts += [f"## {model.__name__}\n", *body(model)]
    return "\n".join(parts)


def metrics() -> str:
    """Returns a row for each metric that a controller shows."""
    counts = JobCounts(num_in_phase={}, oldest_queued_at=None, last_report_at={}, in_phase_since={})
    rows = []
    lines = ControllerMetrics("").exposition(counts).decode().splitlines()
    helps = [line.split(" ", 3)[2:] for line in lines if line.startswith("# HELP")]
    types = dict(line.split(" ", 3)[2:] for line in lines if line.startswith("# TYPE"))
    for name, meaning in helps:
        rows.append(f"| `{name}` | {types[name]} | {LABELS.get(name, '')} | {meaning} |")
    return f"{MADE}{METRICS}" + "\n".join(rows) + "\n"


LABELS = {
    "ngd_build_info": "`version`",
    "ngd_attempts_ended_total": f"`result`: {', '.join(RESULTS)}",
    "ngd_http_requests_total": "`method`, `route`, `status`",
    "ngd_http_request_seconds": "`route`",
    "ngd_jobs": f"`phase`: {', '.join(Phase)}",
    "ngd_longest_in_phase_seconds": "`phase`",
    "ngd_running_job_idle_seconds": "`job_id`",
}

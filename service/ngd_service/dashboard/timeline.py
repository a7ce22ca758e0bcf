"""The job's life as bars: a row for the queue and one for each attempt, a bar for each stage."""

import html
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from nicegui import ui

from ngd_service.client.units import duration, moment
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Event, Job

__all__ = ["KINDS", "Stage", "Timeline", "stages"]

KINDS = ("phase", "started", "workers_restarted", "workers_resized")  # of the events that begin a stage
GROWS_S = 60.0  # between two looks at the last bar's growth: all bars are sent again
LEAST_SHARE = 0.4  # per cent: a stage of a moment stays visible
WORDS = {
    "QUEUED": "queued",
    "STARTING": "starting",
    "TRAINING": "training",
    "RECOVERING": "waiting for the next try",
    "CANCELLING": "stopping",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the job or of an attempt; end None: it goes on. attempt 0: before the first."""

    kind: str
    attempt: int
    start: datetime
    end: datetime | None


def stages(events: Iterable[Event]) -> list[Stage]:
    """Returns the stages that these events begin and end, oldest first.

    An attempt trains from its workers' start on; it starts again where its workers do.
    """
    told: list[Stage] = []
    for event in sorted(events, key=lambda event: (event.time, event.id)):
        kind = _begins(event)
        if kind is None or (told and told[-1].end is None and told[-1].kind == kind):
            continue
        if told and told[-1].end is None:
            last = told[-1]
            told[-1] = Stage(last.kind, last.attempt, last.start, event.time)
        if kind:
            attempt = event.attempt or (told[-1].attempt if told else 0)
            told.append(Stage(kind, attempt, event.time, None))
    return told


def _begins(event: Event) -> str | None:
    """The stage that an event begins; "" for an end, None for neither."""
    if event.kind == "started":
        return "TRAINING"
    if event.kind in ("workers_restarted", "workers_resized"):
        return "STARTING"
    phase = str(event.data.get("to"))
    if phase == "RUNNING":
        return None  # the controller sees it a moment after the workers have said that they started
    return phase if phase in WORDS else ""


class Timeline:
    """A panel with the bars. Its words say the same to those who cannot see it."""

    def __init__(self) -> None:
        self.events: dict[int, Event] = {}
        self.shown_at = -GROWS_S
        with panel("Timeline", "wide"):
            with ui.element("div").classes("panel-body"):
                self.bars = ui.html("", sanitize=False).classes("timeline")
            self.whole = ui.context.slot.parent

    def add(self, events: Iterable[Event]) -> None:
        """Takes the events that begin or end a stage."""
        new = {event.id: event for event in events if event.kind in KINDS}
        self.events |= new
        self.shown_at = -GROWS_S if new else self.shown_at

    def show(self, job: Job, now: datetime | None = None) -> None:
        """Draws the stages up to now, or to the job's end."""
        if not self.events or (time.monotonic() - self.shown_at < GROWS_S and not job.status.is_terminal):
            return
        self.shown_at = time.monotonic()
        self.bars.set_content(_rows(stages(self.events.values()), job.finished_at or now or datetime.now(UTC)))


def _rows(known: Sequence[Stage], end: datetime) -> str:
    begin = known[0].start
    whole = max((end - begin).total_seconds(), 1.0)
    by_row: dict[int, list[Stage]] = {}
    for stage in known:
        by_row.setdefault(0 if stage.kind == "QUEUED" else stage.attempt, []).append(stage)
    rows = []
    for attempt, of_row in by_row.items():
        bars = "".join(_bar(stage, begin, end, whole) for stage in of_row)
        took = ((of_row[-1].end or end) - of_row[0].start).total_seconds()
        name = f"Attempt {attempt}" if attempt else "Queue"
        rows.append(f"<span>{name}</span><div class=bars>{bars}</div><span class=digits>{duration(took)}</span>")
    ends = f"<span></span><div class=ends><span>{moment(begin)}</span><span>{moment(end)} UTC</span></div><span></span>"
    kinds = dict.fromkeys(stage.kind for stage in known)
    legend = "".join(f"<span><i class={kind}></i>{WORDS[kind]}</span>" for kind in kinds)
    return f"<div class=rows>{''.join(rows)}{ends}</div><div class=stages>{legend}</div>"


def _bar(stage: Stage, begin: datetime, end: datetime, whole: float) -> str:
    stop = stage.end or end
    left = 100 * (stage.start - begin).total_seconds() / whole
    width = max(LEAST_SHARE, 100 * (stop - stage.start).total_seconds() / whole)
    took = duration((stop - stage.start).total_seconds())
    told = html.escape(f"{WORDS[stage.kind]}: {took} from {moment(stage.start)}")
    left = min(left, 100 - width)
    return f'<i class={stage.kind} style="left:{left:.2f}%;width:{width:.2f}%" title="{told}" aria-label="{told}"></i>'

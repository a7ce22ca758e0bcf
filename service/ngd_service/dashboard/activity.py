"""What happened to a job in words: the list of its events."""

import html
from collections.abc import Sequence

from nicegui import ui

from ngd_service.client.scores import listed
from ngd_service.client.units import binary_bytes, counted, moment
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Event, Metric

__all__ = ["MOST_EVENTS", "TOLD", "EventPanel", "words"]

MOST_EVENTS = 100
ICONS = {
    "phase": "swap_horiz",
    "started": "rocket_launch",
    "evaluation": "fact_check",
    "checkpoint": "save",
    "checkpoint_failed": "warning",
    "steps_lost": "warning",
    "target_reached": "flag",
    "waiting": "hourglass_empty",
    "workers_restarted": "restart_alt",
    "workers_resized": "unfold_more",
    "failed": "error",
    "cancelled": "block",
    "done": "check_circle",
}
TOLD = tuple(ICONS)  # kinds of events; batches of steps are left to the curves
TONES = {
    "failed": "bad",
    "workers_restarted": "bad",
    "checkpoint_failed": "bad",
    "steps_lost": "bad",
    "done": "good",
    "target_reached": "good",
}


class EventPanel:
    """The job's newest events, newest first; batches of steps are left to the curves."""

    def __init__(self) -> None:
        self.rows: list[ui.element] = []
        with panel("Events"), ui.element("div").classes("panel-body"):
            self.list = ui.element("div").classes("events").props('tabindex=0 role=list aria-label="Events"')
            with self.list:
                self.hint = ui.label("Nothing happened yet").classes("muted")

    def add(self, events: Sequence[Event], metrics: Sequence[Metric] = ()) -> None:
        """Puts these events, oldest first, above those that are there. metrics: of the job."""
        if events:
            self.hint.set_visibility(False)
        for event in events:
            with self.list:
                row = ui.html(_row(event, metrics), sanitize=False)
            row.classes(f"event {_tone(event)}").props("role=listitem")
            row.move(target_index=0)
            self.rows.append(row)
        for oldest in self.rows[:-MOST_EVENTS]:
            self.list.remove(oldest)
        self.rows = self.rows[-MOST_EVENTS:]


def _row(event: Event, metrics: Sequence[Metric]) -> str:
    """One element an event: a list of them is made while the reader waits."""
    icon, text = ICONS.get(event.kind, "info"), html.escape(words(event, metrics))
    return (
        f'<reader-time datetime="{event.time.isoformat()}">{moment(event.time)} UTC</reader-time>'
        f'<i class="q-icon material-icons" aria-hidden="true">{icon}</i><div class="event-text">{text}</div>'
    )


def words(event: Event, metrics: Sequence[Metric] = ()) -> str:
    """An event as one sentence. metrics: of the job, the one that counts first."""
    data = event.data
    match event.kind:
        case "phase":
            why = f": {data['message'] or data['reason']}" if data.get("message") or data.get("reason") else ""
            return f"{str(data['to']).capitalize()}{why}"
        case "started":
            resumed = f", resumed after step {data['resumed_step']:,}" if data["resumed_step"] else ""
            workers = counted(data["world_size"], "worker")
            return f"Attempt {event.attempt}: {workers} on {data['device']} started{resumed}"
        case "evaluation":
            return f"Tested at step {data['step']:,}: {listed(metrics, data['metrics'])}"
        case "checkpoint":
            return f"Checkpoint of step {data['step']:,} saved ({binary_bytes(data['bytes'])})"
        case "checkpoint_failed":
            return f"Checkpoint of step {data['step']:,} left out: {data['message']}"
        case "steps_lost":
            return f"Steps {data['first_step']:,} to {data['last_step']:,} are lost: {data['message']}"
        case "waiting":
            message = str(data["message"] or "waiting is over")
            return message[:1].upper() + message[1:]
        case "target_reached":
            return f"Target reached at step {data['step']:,}: test {listed(metrics, data['metrics'])}"
        case "workers_restarted":
            return f"Workers are started again: {data['message']}"
        case "workers_resized":
            return f"Resized from {data['before']:,} to {counted(data['after'], 'worker')}: {data['message']}"
        case "failed":
            return f"{data['reason']}: {data['message']}"
        case "cancelled":
            return f"Stopped after step {data['step']:,}"
        case "done":
            tested = f": test {listed(metrics, data['metrics'])}" if data["metrics"] else ""
            return f"Done at step {data['step']:,}{tested}"
    return event.kind.replace("_", " ").capitalize()


def _tone(event: Event) -> str:
    if event.kind == "phase":
        return {"FAILED": "bad", "RECOVERING": "bad", "SUCCEEDED": "good"}.get(event.data.get("to", ""), "")
    return TONES.get(event.kind, "")

"""What happened to a job in words: the tail of its log, and the list of its events."""

from nicegui import ui

from service.dashboard.theme import panel
from service.dashboard.units import binary_bytes, number, percent
from service.resources import Event

__all__ = ["EventPanel", "LogPanel", "unseen", "words"]

LOG_LINES = 500
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
    "failed": "error",
    "cancelled": "block",
    "done": "check_circle",
}
TONES = {
    "failed": "bad",
    "workers_restarted": "bad",
    "checkpoint_failed": "bad",
    "steps_lost": "bad",
    "done": "good",
    "target_reached": "good",
}


class LogPanel:
    """The last lines of the newest attempt's log; follows the end until the reader scrolls up."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        with panel("Log", "wide"), ui.element("div").classes("panel-body"):
            self.log = ui.log(max_lines=LOG_LINES).classes("log").props('tabindex=0 role=log aria-label="Log"')
            with self.log:
                self.hint = ui.label("Nothing written yet").classes("muted")

    def show(self, text: str) -> None:
        """Takes the log's tail; lines that are there already are not sent again."""
        new = unseen(self.lines, text.splitlines())
        if not new:
            return
        if self.hint is not None and not self.lines:
            self.log.clear()
        self.lines = [*self.lines, *new][-LOG_LINES:]
        self.log.push("\n".join(new))


class EventPanel:
    """The job's events, newest first; batches of steps are left to the curves."""

    def __init__(self) -> None:
        with panel("Events"), ui.element("div").classes("panel-body"):
            self.list = ui.element("div").classes("events").props('tabindex=0 role=list aria-label="Events"')
            with self.list:
                self.hint = ui.label("Nothing happened yet").classes("muted")

    def add(self, events: list[Event]) -> None:
        """Puts these events, oldest first, above those that are there."""
        told = [event for event in events if event.kind != "steps"]
        if told:
            self.hint.set_visibility(False)
        for event in told:
            with self.list, ui.element("div").classes(f"event {_tone(event)}").props("role=listitem") as row:
                with ui.element("time").props(f'datetime="{event.time.isoformat()}" title="{event.time.isoformat()}"'):
                    ui.label(event.time.astimezone().strftime("%H:%M:%S"))
                ui.icon(ICONS.get(event.kind, "info")).props("aria-hidden=true")
                ui.label(words(event)).classes("event-text")
            row.move(target_index=0)


def unseen(shown: list[str], tail: list[str]) -> list[str]:
    """The lines of `tail` that follow what is shown, where the end of one and the start of the other overlap."""
    for start in range(max(0, len(shown) - len(tail)), len(shown)):
        if shown[start:] == tail[: len(shown) - start]:
            return tail[len(shown) - start :]
    return tail


def words(event: Event) -> str:
    """An event as one sentence."""
    data = event.data
    match event.kind:
        case "phase":
            why = f": {data['message'] or data['reason']}" if data.get("message") or data.get("reason") else ""
            return f"{str(data['to']).capitalize()}{why}"
        case "started":
            resumed = f", resumed after step {data['resumed_step']:,}" if data["resumed_step"] else ""
            return f"Attempt {event.attempt}: {data['world_size']} workers on {data['device']} started{resumed}"
        case "evaluation":
            return (
                f"Tested at step {data['step']:,}: accuracy {percent(float(data['test_accuracy']))}, "
                f"loss {number(float(data['test_loss']))}"
            )
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
            return f"Target reached at step {data['step']:,}: test accuracy {percent(data['test_accuracy'])}"
        case "workers_restarted":
            return f"Workers are started again: {data['message']}"
        case "failed":
            return f"{data['reason']}: {data['message']}"
        case "cancelled":
            return f"Stopped after step {data['step']:,}"
        case "done":
            return f"Done at step {data['step']:,}: test accuracy {percent(float(data['test_accuracy']))}"
    return event.kind.replace("_", " ").capitalize()


def _tone(event: Event) -> str:
    if event.kind == "phase":
        return {"FAILED": "bad", "RECOVERING": "bad", "SUCCEEDED": "good"}.get(event.data.get("to", ""), "")
    return TONES.get(event.kind, "")

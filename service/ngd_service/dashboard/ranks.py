"""The ranks beside each other: who is the straggler of a step, and what each process takes of its machine."""

import html
from statistics import median
from typing import Any

from nicegui import ui

from ngd_service.client.units import binary_bytes, number, percent
from ngd_service.dashboard.measures import SECONDS
from ngd_service.dashboard.theme import panel
from ngd_service.resources import Anatomy, RankAnatomy

__all__ = ["PhasesByRank", "Workers", "straggler"]

WAITS = ("loss_reduce", "reduce", "publish")  # they contain the wait for the slowest rank
LATE = 1.25  # times the median of all ranks: a rank that works so long is called a straggler
NO_PSUTIL = "psutil is not installed on the workers: pip install psutil"


class PhasesByRank:
    """A row for each rank, a column for each phase; a darker cell is a longer time."""

    def __init__(self) -> None:
        with panel("Phases by rank", "wide"):
            self.whole = ui.context.slot.parent
            self.note = ui.label("No data yet").classes("panel-note digits")
            with ui.element("div").classes("panel-body"):
                self.table = ui.html("", sanitize=False).classes("plain-table phases-by-rank")
        self.whole.set_visibility(False)

    def show(self, told: Anatomy) -> None:
        """Takes the newest that was told; nothing new leaves what is there."""
        if told.ranks is None:
            return
        self.whole.set_visibility(True)
        self.note.set_text(f"{straggler(told.ranks)}; mean of {told.ranks.steps:,} steps up to {told.ranks.step:,}")
        self.table.set_content(_phase_table(told.ranks))


class Workers:
    """A row for each rank: its machine, CPU, memory, GPU and network."""

    def __init__(self) -> None:
        with panel("Workers", "wide"):
            self.whole = ui.context.slot.parent
            self.note = ui.label("No data yet").classes("panel-note digits")
            with ui.element("div").classes("panel-body"):
                self.table = ui.html("", sanitize=False).classes("plain-table")
        self.whole.set_visibility(False)

    def show(self, told: Anatomy) -> None:
        """Takes the newest that was told; nothing new leaves what is there."""
        if told.ranks is None:
            return
        self.whole.set_visibility(True)
        self.note.set_text(_said_of_workers(told.ranks))
        self.table.set_content(_worker_table(told.ranks))


def straggler(ranks: RankAnatomy) -> str:
    """Returns a sentence on the rank that works longest in a step, waiting left out."""
    work = [sum(of_rank) for of_rank in zip(*_work(ranks), strict=True)]
    if len(work) < 2 or not any(work):
        return "one rank" if len(work) == 1 else "no phase is told"
    slowest, usual = max(range(len(work)), key=work.__getitem__), median(work)
    if usual == 0 or work[slowest] < LATE * usual:
        return f"no straggler: the slowest rank works {number(work[slowest] / (usual or 1.0))} times the median"
    phase = max((name for name in ranks.seconds if name not in WAITS), key=lambda name: _excess(ranks, name, slowest))
    factor = number(work[slowest] / usual)
    return f"rank {slowest} is a straggler: it works {factor} times the median, most of it in {_words(phase)}"


def _work(ranks: RankAnatomy) -> list[list[float]]:
    return [of for phase, of in ranks.seconds.items() if phase not in WAITS]


def _excess(ranks: RankAnatomy, phase: str, rank: int) -> float:
    return ranks.seconds[phase][rank] - median(ranks.seconds[phase])


def _phase_table(ranks: RankAnatomy) -> str:
    longest = max((value for of in ranks.seconds.values() for value in of), default=0.0) or 1.0
    heads = "".join(f"<th class=right>{html.escape(_words(phase))}</th>" for phase in ranks.seconds)
    rows = "".join(
        f"<tr><td>{rank}<td class=mono>{html.escape(host)}"
        + "".join(_cell(of[rank], of[rank] / longest) for of in ranks.seconds.values())
        + f"<td class='digits right'>{SECONDS.words(sum(of[rank] for of in ranks.seconds.values()))}</tr>"
        for rank, host in enumerate(ranks.hosts[: len(ranks.cpu)])
    )
    return f"<table><tr><th>rank<th>machine{heads}<th class=right>step</tr>{rows}</table>"


def _cell(seconds: float, share: float) -> str:
    shade = f"color-mix(in srgb, var(--series-1) {40 * share:.0f}%, transparent)"
    return f'<td class="digits right" style="background: {shade}">{SECONDS.words(seconds)}'


def _worker_table(ranks: RankAnatomy) -> str:
    heads = ("CPU, cores", "memory", "GPU", "GPU memory", "machine sends", "machine receives")
    row_of = {
        "cpu": [_known(value, number) for value in ranks.cpu],
        "memory": [_known(value, binary_bytes) for value in ranks.memory_bytes],
        "gpu": [_gpu(ranks, value, percent) for value in ranks.gpu],
        "gpu_memory": [_gpu(ranks, value, binary_bytes) for value in ranks.gpu_memory_bytes],
        "sent": [_known(value, _rate) for value in ranks.sent_bytes_per_s],
        "received": [_known(value, _rate) for value in ranks.received_bytes_per_s],
    }
    cells = zip(*row_of.values(), strict=True)
    rows = "".join(
        f"<tr><td>{rank}<td class=mono>{html.escape(host)}"
        + "".join(f"<td class='digits right'>{html.escape(cell)}" for cell in of_rank)
        + "</tr>"
        for rank, (host, of_rank) in enumerate(zip(ranks.hosts, cells, strict=False))
    )
    named = "".join(f"<th class=right>{head}" for head in heads)
    return f"<table><tr><th>rank<th>machine{named}</tr>{rows}</table>"


def _known(value: float | None, words: Any) -> str:
    return "—" if value is None else str(words(value))


def _gpu(ranks: RankAnatomy, value: float | None, words: Any) -> str:
    return "no GPU" if ranks.device == "cpu" else _known(value, words)


def _rate(value: float) -> str:
    return f"{binary_bytes(value)}/s"


def _said_of_workers(ranks: RankAnatomy) -> str:
    said = [f"{len(ranks.hosts):,} x {ranks.device}, at step {ranks.step:,}"]
    if len(ranks.hosts) > len(ranks.cpu):
        said.append(f"the first {len(ranks.cpu):,} ranks tell")
    if all(value is None for value in ranks.cpu):
        said.append(NO_PSUTIL)
    if ranks.device != "cpu" and all(value is None for value in ranks.gpu):
        said.append("pynvml is not installed on the workers, or the GPU does not tell its use")
    return "; ".join(said)


def _words(phase: str) -> str:
    return phase.replace("_", " ")

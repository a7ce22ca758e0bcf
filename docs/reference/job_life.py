"""Draws docs/pictures/job.svg from a real job: one of two workers is killed, and the job goes on. Run: make pictures"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.figure import Figure

from benchmarks.themes import themed
from deploy.demo import ROOT, service_of
from ngd_service.client.edits import with_settings
from ngd_service.resources import Event

PICTURE = ROOT / "docs" / "pictures" / "job.svg"
MINE = ROOT / "examples" / "start"
KILLED_AT = 230  # training passes of rank 1: between two checkpoints
SETTINGS = ["resources={workers: 2}", "schedule={epochs: 50}", "checkpoint={every_steps: 100}",
            "task.function=dying:loss", "seed=1"]  # fmt: skip
DYING = f"""
import os, signal
from pathlib import Path

import torch.distributed as dist

import mine

passes = 0


def loss(model, batch):
    global passes
    passes += model.training
    mark = Path(os.environ["KILLED_ONCE"])
    if dist.is_initialized() and dist.get_rank() == 1 and passes == {KILLED_AT} and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mine.loss(model, batch)
"""
WAIT_S = 400
PHASE, STARTS, TRAINS, WAITS = "#d0d0d0", "#ffcc80", "#90caf9", "#b0b0b0"


def main() -> None:
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "ngd", "svg.fonttype": "none", "font.size": 9})
    _life(*_run()).savefig(PICTURE, metadata={"Date": None})
    PICTURE.write_text(themed(PICTURE.read_text()))


def _run() -> tuple[list[Event], float]:
    """Returns the events of the job, and when its worker was killed."""
    with tempfile.TemporaryDirectory() as place, service_of(Path(place, "home")) as client:
        folder = Path(shutil.copytree(MINE, Path(place, "mine")))
        (folder / "dying.py").write_text(DYING)
        spec = with_settings(yaml.safe_load((folder / "job.yaml").read_text()), SETTINGS)
        spec["env"] = {"KILLED_ONCE": os.path.join(place, "killed")}
        job = client.submit(client.ship(spec, folder).spec)
        ended = client.wait(job.id, timeout_s=WAIT_S)
        if ended.status.phase != "SUCCEEDED":
            raise SystemExit(f"the job ended as {ended.status.phase}: {ended.status.message}")
        return client.events(job.id, limit=1000).events, Path(place, "killed").stat().st_mtime


def _life(events: list[Event], killed_s: float) -> Any:
    """Returns a lane for the service and one for each worker; the widths are seconds."""
    zero = events[0].time.timestamp()
    at = [(event.time.timestamp() - zero, event.kind, event.data) for event in events]
    killed, end = killed_s - zero, at[-1][0]
    (restarted,) = [time for time, kind, _ in at if kind == "workers_restarted"]
    first, second = [time for time, kind, _ in at if kind == "started"]
    (done,) = [time for time, kind, _ in at if kind == "done"]
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axis = figure.subplots()
    phases = [(time, data["to"]) for time, kind, data in at if kind == "phase"]
    for (time, phase), (until, _) in zip(phases, [*phases[1:], (end, "")], strict=True):
        axis.barh(0, until - time, 0.6, time, color=PHASE, edgecolor="white", lw=1.5)
        if until - time > end / 20 or until == time:
            axis.text(time if until > time else time + end / 200, -0.05, f" {phase}", va="center", fontsize=8)
    parts = {
        "workers start": (STARTS, [(0.0, first, (-1, -2)), (restarted, second, (-1, -2))]),
        "train": (TRAINS, [(first, killed, (-1, -2)), (second, done, (-1, -2))]),
        "waits until that is noticed": (WAITS, [(killed, restarted, (-1,))]),
    }
    for label, (colour, spans) in parts.items():
        for number, (time, until, lanes) in enumerate(spans):
            axis.barh(lanes, until - time, 0.6, time, color=colour, label=None if number else label)
    _marks(axis, at, killed)
    axis.text(second, -1.52, "from the checkpoint", va="center", fontsize=8)
    axis.set_yticks([0, -1, -2], ["phase", "rank 0", "rank 1"])
    axis.set(xlabel="seconds since POST", xlim=(0, 1.12 * end), ylim=(-2.5, 0.6))
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _marks(axis: Any, at: list[tuple[float, str, dict[str, Any]]], killed: float) -> None:
    for kind, mark, colour, label in (
        ("checkpoint", "v", "#26a69a", "checkpoint"),
        ("target_reached", "*", "#fb8c00", "target reached"),
    ):
        times = [time for time, of_kind, _ in at if of_kind == kind]
        axis.plot(times, [-0.52] * len(times), mark, color=colour, ms=7, label=label)
    axis.plot([killed], [-2], "X", color="#d62728", ms=9, label="killed")


if __name__ == "__main__":
    main()

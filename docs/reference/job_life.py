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
QUEUED, STARTS, TRAINS = "#b0bec5", "#ffcc80", "#3949ab"


def main() -> None:
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "ngd", "svg.fonttype": "none", "font.size": 9})
    _life(_events()).savefig(PICTURE, metadata={"Date": None})
    PICTURE.write_text(themed(PICTURE.read_text()))


def _events() -> list[Event]:
    with tempfile.TemporaryDirectory() as place, service_of(Path(place, "home")) as client:
        folder = Path(shutil.copytree(MINE, Path(place, "mine")))
        (folder / "dying.py").write_text(DYING)
        spec = with_settings(yaml.safe_load((folder / "job.yaml").read_text()), SETTINGS)
        spec["env"] = {"KILLED_ONCE": os.path.join(place, "killed")}
        job = client.submit(client.ship(spec, folder).spec)
        ended = client.wait(job.id, timeout_s=WAIT_S)
        if ended.status.phase != "SUCCEEDED":
            raise SystemExit(f"the job ended as {ended.status.phase}: {ended.status.message}")
        return client.events(job.id, limit=1000).events


def _life(events: list[Event]) -> Any:
    """Returns a lane for the service and one for each worker; the widths are seconds."""
    zero = events[0].time.timestamp()
    at = [(event.time.timestamp() - zero, event.kind, event.data) for event in events]
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axis = figure.subplots()
    end = at[-1][0]
    phases = [(time, data["to"]) for time, kind, data in at if kind == "phase"]
    colours = {"QUEUED": QUEUED, "STARTING": STARTS, "RUNNING": TRAINS}
    for (time, phase), (until, _) in zip(phases, [*phases[1:], (end, "")], strict=True):
        if phase in colours:
            axis.barh(0, until - time, 0.6, time, color=colours[phase])
    starting = next(time for time, phase in phases if phase == "STARTING")
    started = [time for time, kind, _ in at if kind == "started"]
    (killed,) = [time for time, kind, _ in at if kind == "workers_restarted"]
    done = next(time for time, kind, _ in at if kind == "done")
    for lane in (-1, -2):
        for time, until, colour in ((starting, started[0], STARTS), (started[0], killed, TRAINS),
                                    (killed, started[1], STARTS), (started[1], done, TRAINS)):  # fmt: skip
            axis.barh(lane, until - time, 0.6, time, color=colour)
    _marks(axis, at, killed)
    for colour, label in ((QUEUED, "queued"), (STARTS, "workers start"), (TRAINS, "trains")):
        axis.barh(0, 0, color=colour, label=label)
    axis.set_yticks([0, -1, -2], ["service's phase", "rank 0", "rank 1"])
    axis.set(xlabel="seconds since POST", ylim=(-2.5, 0.9))
    figure.legend(loc="outside lower center", ncols=7, fontsize=8)
    return figure


def _marks(axis: Any, at: list[tuple[float, str, dict[str, Any]]], killed: float) -> None:
    checkpoints = [time for time, kind, _ in at if kind == "checkpoint"]
    target = [time for time, kind, _ in at if kind == "target_reached"]
    resumed = [data["resumed_step"] for _, kind, data in at if kind == "started" and data.get("resumed_step")]
    axis.plot(checkpoints, [-0.55] * len(checkpoints), "v", color="#26a69a", ms=6, label="checkpoint")
    axis.plot(target, [-0.55] * len(target), "*", color="#fb8c00", ms=9, label="target reached")
    axis.plot([killed], [-2], "X", color="#d62728", ms=9, label="killed")
    if resumed:
        axis.text(killed, 0.45, f"goes on from step {resumed[-1]}", fontsize=8)


if __name__ == "__main__":
    main()

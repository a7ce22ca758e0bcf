"""Runs the main job end to end: a service, SP-NGD on two workers over HTTP, and SGD beside it. For `make demo`."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import plotext as plot
from rich.console import Console
from rich.table import Table

from ngd_service.cli.follow import follow
from ngd_service.client.client import Client, ServiceError, ServiceUnreachableError
from ngd_service.client.comparison import History, address, goals, verdict
from ngd_service.client.edits import with_settings
from ngd_service.client.scores import bound, score
from ngd_service.resources import Job
from ngd_service.settings import load_common_settings
from ngd_workers.contract.spec_file import load_mapping

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".ngd" / "demo"
RECIPES = {"SP-NGD": "digits.yaml", "SGD with momentum": "digits-sgd.yaml"}
# Where a natural gradient pays by docs/methods.md: batch 4,096, and the rival at the best lr of its search.
LARGE_BATCH = {"SP-NGD": "fashion-mnist-adaptive.yaml", "AdamW": "fashion-mnist-adamw.yaml"}
AS_COMPARED = ("target.value=0.85", "schedule.evaluate_every_steps=4")
ALONE = {
    "NGD_DATABASE_URL": "",
    "NGD_API_KEYS_DIR": "",
}  # this home has no API key, and can't use another home's database
START_S = 60.0
STOP_S = 30.0
PATIENCE_S = 5.0  # for a lost connection: no one restarts this service


def main(arguments: Sequence[str] = ()) -> int:
    """Returns 0 only if both jobs succeeded and SP-NGD reached the target of its recipe."""
    recipes = LARGE_BATCH if "large-batch" in arguments else RECIPES
    if recipes is LARGE_BATCH and not os.environ.get("NGD_DATA_DIR"):
        raise SystemExit("demo: large-batch needs NGD_DATA_DIR, the folder that holds fashion-mnist/")
    changes = AS_COMPARED if recipes is LARGE_BATCH else ()
    console = Console(markup=False, emoji=False, highlight=False)
    shutil.rmtree(HOME, ignore_errors=True)
    with service_of(HOME) as client:
        console.print(f"dashboard: {client.base_url} (while this runs)")
        jobs = {method: _run(client, recipe, changes, console) for method, recipe in recipes.items()}
        runs = {method: (job, client.history(job.id)) for method, job in jobs.items()}
    console.print(curves(runs), soft_wrap=True)
    console.print(_table(jobs))
    console.print(in_words(runs), soft_wrap=True)
    page = address(load_common_settings().url, [job.id for job in jobs.values()])
    console.print(f"To see both in a dashboard that stays: NGD_HOME=.ngd/demo make serve, then {page}", soft_wrap=True)
    failures = [job.status.message or job.status.phase for job in jobs.values() if job.status.phase != "SUCCEEDED"]
    if not failures and _target_step(jobs["SP-NGD"]) is None:
        failures = [f"SP-NGD did not reach its target, test {_target(jobs['SP-NGD'])}"]
    for failure in failures:
        console.print(f"failed: {failure}", style="red")
    return 1 if failures else 0


@contextmanager
def service_of(home: Path) -> Iterator[Client]:
    """Starts a service on this home, and stops it at the end, after its jobs, which would survive it."""
    home.mkdir(parents=True, exist_ok=True)
    log = home / "service.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "ngd_service", "--port", "0", "--home", str(home)]
        # In a new session: Ctrl-C reaches this process alone, which cancels the jobs while the service is up.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | ALONE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with Client(_url(process, log), patience_s=PATIENCE_S) as client:
            try:
                yield client
            finally:
                _cancel_all(client)
    except ServiceUnreachableError as error:
        if process.poll() is None:
            raise
        raise SystemExit(f"demo: the service has ended with status {process.returncode}; see {log}") from error
    finally:
        process.terminate()
        process.wait(STOP_S)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        _, separator, rest = log.read_text().partition("serves on ")
        if separator and ";" in rest:
            return rest.partition(";")[0]
        time.sleep(0.1)
    raise SystemExit(f"the service did not start within {START_S:.0f} s: {log.read_text().strip()}")


def _cancel_all(client: Client) -> None:
    for job in client.list_jobs(page_size=1000).jobs:
        if not job.status.is_terminal:
            client.cancel(job.id)
            client.wait(job.id, timeout_s=STOP_S)


def _run(client: Client, recipe: str, changes: Sequence[str], console: Console) -> Job:
    job = client.submit(with_settings(load_mapping(ROOT / "workers" / "ngd_workers" / "recipes" / recipe), changes))
    return follow(client, job.id, console)


def _target(job: Job) -> str | None:
    """Returns the job's target in words: "perplexity at most 5.4"; None: it has none."""
    target = bound(job)
    return None if target is None else f"{target[0].label} {target[1]}"


def _target_step(job: Job) -> int | None:
    """Returns the step that reached the target; if the spec has no target, the last step."""
    result = job.status.result
    if result is None:
        return None
    return result.step if _target(job) is None else result.target_step


def _table(jobs: dict[str, Job]) -> Table:
    """Returns a row for each job: the metric that counts for it, and the steps and seconds that it took."""
    counts = next((job.metrics[0] for job in jobs.values() if job.metrics), None)
    tested = "result" if counts is None else f"test {counts.label}"
    target = next(filter(None, map(_target, jobs.values())), "the end")
    table = Table("optimizer", tested, "steps", f"steps to {target}", "seconds of training", box=None)
    for method, job in jobs.items():
        result = job.status.result
        value = "-" if result is None or counts is None else score(counts, result.metrics.get(counts.name))
        seconds = "-" if result is None or result.seconds is None else f"{result.seconds:.1f}"
        reached = "not reached" if _target_step(job) is None else str(_target_step(job))
        table.add_row(method, value, str(job.status.progress.step), reached, seconds)
    return table


def curves(runs: Mapping[str, tuple[Job, History]]) -> str:
    """Returns the tested metric that counts over the steps, in characters; a mark of its own for each job."""
    counts = next((job.metrics[0] for job, _ in runs.values() if job.metrics), None)
    if counts is None:
        return ""
    plot.clear_figure()
    plot.theme("clear")
    plot.plotsize(72, 16)
    for (method, (_, history)), mark in zip(runs.items(), ("*", "o"), strict=False):
        tested = [(step, metrics[counts.name]) for step, _, metrics in history.evaluations if counts.name in metrics]
        if tested:
            plot.plot(*map(list, zip(*tested, strict=True)), marker=mark, label=method)
    target = next((goal.value for goal in goals(job for job, _ in runs.values())), None)
    if target is not None:
        plot.hline(target)
    plot.title(f"test {counts.label} over steps; the line is the target")
    return str(plot.uncolorize(plot.build()))


def in_words(runs: Mapping[str, tuple[Job, History]]) -> str:
    """Returns which of the jobs was first to the target, and why if the steps and the seconds name different ones."""
    wanted = goals(job for job, _ in runs.values())
    if not wanted:
        return "The jobs have no target that was tested, so there is nothing to compare."
    told = verdict(runs, wanted[0])
    (ours, mine), (other, others) = ((name, history.reached(wanted[0])) for name, (_, history) in runs.items())
    if mine is None or others is None or mine[0] >= others[0] or mine[1] <= others[1]:
        return told
    return (
        f"{told[:-1]}: a step of {ours} measures the curvature of the loss too, and with a model this small that takes "
        f"longer than the gradient, which is all that {other} computes. docs/performance.md shows where it pays."
    )


def _seconds(job: Job) -> float | None:
    return None if job.status.result is None else job.status.result.seconds


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ServiceError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

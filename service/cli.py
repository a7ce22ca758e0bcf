"""The `ngd` command. Each verb is one call of the client; heavy imports wait until a verb needs them."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.client import Client, ServiceError
from service.errors import StartupError
from service.follow import EXIT_CODES, follow, mark
from workers.errors import SpecError

if TYPE_CHECKING:
    from service.settings import Settings

__all__ = ["main"]

app = typer.Typer(
    help="Train with SP-NGD: a service for jobs, and the commands that talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)

Url = Annotated[str | None, typer.Option("--url", help="Where the service listens [default: NGD_HOST and NGD_PORT].")]
JobId = Annotated[str, typer.Argument(help="The job's id.")]
SpecFile = Annotated[Path, typer.Argument(help="A job in YAML or JSON.", exists=True, dir_okay=False, readable=True)]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a foreseeable failure is one message on stderr and its exit code."""
    try:
        app(arguments)
    except StartupError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except (ServiceError, SpecError) as error:
        _complain(error)
        sys.exit(1)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        out.print(f"ngd {version('ngd-dist')}")
        raise typer.Exit


@app.callback()
def ngd(
    should_print_version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Holds the options that stand before a verb."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Loopback address to listen on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port [default: 8000]; 0: any free one.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of runs and database [default: ~/.ngd].")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where relative data directories lie.")] = None,
) -> None:
    """Keep the service and its dashboard up. Each setting may also come from NGD_<NAME>."""
    from service.server import serve as serve_forever
    from service.settings import load_settings

    settings = load_settings(host=host, port=port, home=home, data_dir=data_dir)
    serve_forever(settings, announce=_announce)


@app.command()
def submit(
    file: SpecFile,
    should_follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the progress until the job ends.")
    ] = False,
    url: Url = None,
) -> None:
    """Post a job. With --follow the exit status is 0 if it succeeded, 1 if it failed, 3 if it was cancelled."""
    with _client(url) as client:
        job = client.submit(_text(file))
        out.print(f"{job.id}  {client.base_url}/jobs/{job.id}", soft_wrap=True)
        if should_follow:
            raise typer.Exit(EXIT_CODES.get(follow(client, job.id, out).status.phase, 1))


@app.command()
def jobs(
    url: Url = None,
    phase: Annotated[str | None, typer.Option(help="Only jobs in this phase.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest this many.")] = 20,
) -> None:
    """List jobs, newest first."""
    with _client(url) as client:
        page = client.list_jobs(page_size=limit, phase=phase)
    table = Table("id", "name", "phase", "step", "loss", "accuracy", "created", box=None)
    table.columns[0].no_wrap = True  # an id that is cut in two can be neither copied nor piped
    for job in page.jobs:
        progress, metrics = job.status.progress, job.metrics_latest
        step = f"{progress.step}/{progress.total_steps}" if progress.total_steps else "-"
        loss, accuracy = (f"{metrics[name]:.4g}" if name in metrics else "-" for name in ("loss", "accuracy"))
        created = f"{job.created_at:%Y-%m-%d %H:%M:%SZ}"
        table.add_row(job.id, job.name, f"{mark(job)} {job.status.phase}", step, loss, accuracy, created)
    out.print(table if page.jobs else "no jobs yet; post one with: ngd submit FILE")


@app.command()
def get(job_id: JobId, url: Url = None) -> None:
    """Print a job as JSON."""
    with _client(url) as client:
        out.print_json(client.get(job_id).model_dump_json())


@app.command()
def logs(
    job_id: JobId,
    should_follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt [default: the newest].")] = None,
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines.")] = None,
    url: Url = None,
) -> None:
    """Print what a job's processes wrote."""
    with _client(url) as client:
        if not should_follow:
            sys.stdout.write(client.logs(job_id, attempt=attempt, tail=tail))
            return
        for chunk in client.follow_logs(job_id, attempt=attempt, tail=tail):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()


@app.command()
def cancel(job_id: JobId, url: Url = None) -> None:
    """Ask a job to stop; it saves a checkpoint first if it can."""
    with _client(url) as client:
        job = client.cancel(job_id)
    out.print(f"{job.id} is {job.status.phase}; desired: {job.desired_state}")


@app.command()
def train(
    file: SpecFile,
    run_dir: Annotated[Path, typer.Option(help="Where checkpoints and events go.")] = Path("run"),
    data_dir: Annotated[
        Path | None, typer.Option(envvar="NGD_DATA_DIR", help="Where relative data directories lie.")
    ] = None,
) -> None:
    """Train in one process, without a service: python -m workers.loop, which torchrun can run on several."""
    from service.settings import load_settings

    data_dir = data_dir or load_settings().data_dir
    command = [sys.executable, "-m", "workers.loop", str(file), "--run-dir", str(run_dir)]
    command += ["--data-dir", str(data_dir)] if data_dir else []
    try:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"the spec {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as such"
        ) from error


def _client(url: str | None) -> Client:
    from service.settings import load_settings

    return Client(url or load_settings().url)


def _announce(settings: "Settings") -> None:
    out.print(f"ngd-dist serves on {settings.url}; its runs are in {settings.home}", soft_wrap=True)


def _complain(error: Exception) -> None:
    err.print(f"ngd: {error}", style="red", soft_wrap=True)

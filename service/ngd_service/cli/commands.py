"""The `ngd` command. Each verb is one call of the client; heavy imports wait until a verb needs them."""

import subprocess
import sys
import webbrowser
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ngd_service.cli.checkpoints import Format, checkpoint_table, exported, fetched
from ngd_service.cli.comparing import comparison_table
from ngd_service.cli.data import data
from ngd_service.cli.follow import EXIT_CODES, follow
from ngd_service.cli.listing import job_table
from ngd_service.cli.planning import plan
from ngd_service.cli.terminal import harmless
from ngd_service.client.client import Client, InvalidKeyError, ServiceError
from ngd_service.client.comparison import address, goals
from ngd_service.client.edits import continued, with_settings
from ngd_service.client.endpoints import Spec
from ngd_service.errors import StartupError
from ngd_workers.contract.checkpoint_files import WEIGHTS
from ngd_workers.contract.errors import SpecError, WorkerError
from ngd_workers.contract.spec_file import load_mapping

if TYPE_CHECKING:
    from ngd_service.settings import Settings

__all__ = ["main"]

app = typer.Typer(
    help="Train with SP-NGD: a service for jobs, and the commands that talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")
app.command()(plan)
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)

Url = Annotated[
    str | None, typer.Option("--url", help="Where the service is.", show_default="NGD_URL, or NGD_HOST and NGD_PORT")
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help="File with your API key.", show_default="NGD_API_KEY_FILE, or NGD_API_KEY itself"),
]
JobId = Annotated[str, typer.Argument(help="The job's id.")]
Step = Annotated[int | None, typer.Option(min=0, help="Of this step [default: the newest].")]
IsBest = Annotated[bool, typer.Option("--best", help="Of the step with the best test result.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder to write to [default: <name>-step-<step>].")
]
SpecFile = Annotated[Path, typer.Argument(help="A job in YAML or JSON.", exists=True, dir_okay=False, readable=True)]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a foreseeable failure is one message on stderr and its exit code."""
    try:
        app(arguments)
    except StartupError as error:
        _complain(error)
        sys.exit(error.exit_code)
    except (ServiceError, WorkerError) as error:
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
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0: any free one.", show_default="8000")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of runs and database.", show_default="~/.ngd")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where relative data directories lie.")] = None,
) -> None:
    """Keep the service and its dashboard up. Each setting may also come from NGD_<NAME>."""
    from ngd_service.server import serve as serve_forever
    from ngd_service.settings import load_settings

    settings = load_settings(host=host, port=port, home=home, data_dir=data_dir)
    serve_forever(settings, announce=_announce)


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date, and end; `ngd serve` does so at its start too."""
    from ngd_service.server import migrate as bring_up_to_date
    from ngd_service.settings import load_settings

    out.print(bring_up_to_date(load_settings()), soft_wrap=True)


@app.command()
def submit(
    file: Annotated[
        Path | None,
        typer.Argument(help="A job in YAML or JSON; with --from the job's own spec is the default.", dir_okay=False),
    ] = None,
    origin: Annotated[
        str | None, typer.Option("--from", help="JOB or JOB@STEP: go on from its checkpoint, with all of its state.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="path=value: a setting in place of the spec's; may be repeated.")
    ] = None,
    should_follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the progress until the job ends.")
    ] = False,
    should_log: Annotated[bool, typer.Option("--log", "-l", help="With --follow: show the job's log too.")] = False,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="The same key and job make one job, however often it is posted.", show_default="a new one"),
    ] = None,
    url: Url = None,
    key_file: KeyFile = None,
) -> None:
    """Post a job, and ship the folder that its `code` names; or go on from another job, under other settings.

    With --follow the exit status is 0 if it succeeded, 1 if it failed, 3 if it was cancelled.
    """
    if should_log and not should_follow:
        raise typer.BadParameter("--log goes with --follow; give both, or see: ngd logs")
    with _client(url, key_file) as client:
        shipment = client.ship(_spec(client, file, origin, settings or []), file.parent if file else Path())
        if shipment.archive is not None:
            err.print(f"{shipment}", soft_wrap=True)  # the job's id is the first word on stdout
        job = client.submit(shipment.spec, idempotency_key=idempotency_key)
        out.print(f"{job.id}  {client.base_url}/jobs/{job.id}", soft_wrap=True)
        if should_follow:
            raise typer.Exit(EXIT_CODES.get(follow(client, job.id, out, with_log=should_log).status.phase, 1))


@app.command()
def jobs(
    url: Url = None,
    key_file: KeyFile = None,
    phase: Annotated[str | None, typer.Option(help="Only jobs in this phase.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest this many.")] = 20,
) -> None:
    """List jobs, newest first."""
    with _client(url, key_file) as client:
        page = client.list_jobs(page_size=limit, phase=phase)
    if page.jobs:
        out.print(job_table(page.jobs, out), crop=False, soft_wrap=True)
    elif phase is None:
        out.print("no jobs yet; post one with: ngd submit FILE")
    else:
        out.print(f"no job is {phase.upper()}; see all of them with: ngd jobs")


@app.command()
def get(job_id: JobId, url: Url = None, key_file: KeyFile = None) -> None:
    """Print a job as JSON."""
    with _client(url, key_file) as client:
        out.print_json(client.get(job_id).model_dump_json())


@app.command()
def logs(
    job_id: JobId,
    should_follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt.", show_default="the newest")] = None,
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only what this rank wrote.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write all that is kept, as it is, to this file.")
    ] = None,
    is_raw: Annotated[
        bool, typer.Option("--raw", help="Send control sequences in it to the terminal: colours, and whatever else.")
    ] = False,
    url: Url = None,
    key_file: KeyFile = None,
) -> None:
    """Print the output of a job's processes."""
    if output is not None and (should_follow or tail is not None or is_raw):
        raise typer.BadParameter("--output writes the whole log; leave out --follow, --tail and --raw")
    shown = str if is_raw or not sys.stdout.isatty() else harmless
    with _client(url, key_file) as client:
        if output is not None:
            _save(client.download_log(job_id, attempt=attempt, rank=rank), output)
        elif not should_follow:
            sys.stdout.write(shown(client.logs(job_id, attempt=attempt, tail=tail, rank=rank)))
        else:
            for chunk in client.follow_logs(job_id, attempt=attempt, tail=tail, rank=rank):
                sys.stdout.write(shown(chunk.text))
                sys.stdout.flush()


@app.command()
def compare(
    job_ids: Annotated[list[str], typer.Argument(help="The jobs' ids, two at least.")],
    should_open: Annotated[bool, typer.Option("--open", help="Show their curves too, in a browser.")] = False,
    url: Url = None,
    key_file: KeyFile = None,
) -> None:
    """Show jobs side by side: the settings that differ, and when each reached each target."""
    if len(job_ids) < 2:
        raise typer.BadParameter("a comparison takes two jobs at least; give another id")
    with _client(url, key_file) as client:
        compared = [client.get(job_id) for job_id in job_ids]
        histories = [client.history(job_id) for job_id in job_ids]
        page = address(client.base_url, job_ids)
    out.print(comparison_table(compared, histories, goals(compared), out), crop=False, soft_wrap=True)
    if should_open:
        out.print(page, soft_wrap=True)
        webbrowser.open(page)


@app.command()
def checkpoints(
    job_id: JobId,
    pin: Annotated[int | None, typer.Option(min=0, help="Keep that of this step, whatever comes after it.")] = None,
    unpin: Annotated[int | None, typer.Option(min=0, help="Let that of this step go when newer ones come.")] = None,
    url: Url = None,
    key_file: KeyFile = None,
) -> None:
    """List the checkpoints that a job keeps, newest first; pin one, or unpin one, before."""
    with _client(url, key_file) as client:
        if pin is not None:
            client.pin(job_id, pin)
        if unpin is not None:
            client.unpin(job_id, unpin)
        kept = client.checkpoints(job_id)
    if kept:
        out.print(checkpoint_table(kept))
    else:
        out.print("it has saved no checkpoint yet")


@app.command()
def download(
    job_id: JobId,
    step: Step = None,
    is_best: IsBest = False,
    should_take_all: Annotated[
        bool, typer.Option("--all", help="Also what training goes on from: the optimizer's state.")
    ] = False,
    output: Output = None,
    url: Url = None,
    key_file: KeyFile = None,
) -> None:
    """Get the weights of a job, and a card that tells of their origin. A transfer that broke off goes on."""
    with _client(url, key_file) as client:
        paths = fetched(client, job_id, err, step=step, best=is_best, folder=output, everything=should_take_all)
    for path in paths.values():
        out.print(harmless(f"{path}  {path.stat().st_size:,} bytes"), soft_wrap=True)


@app.command()
def export(
    job_id: JobId,
    kind: Annotated[Format, typer.Option("--format", help="safetensors: the weights. Others: the model as a program.")],
    step: Step = None,
    is_best: IsBest = False,
    output: Output = None,
    url: Url = None,
    key_file: KeyFile = None,
) -> None:
    """Write a job's model for programs that know nothing of this one. All but safetensors need torch here."""
    with _client(url, key_file) as client:
        paths = fetched(client, job_id, err, step=step, best=is_best, folder=output, everything=False)
        path = paths[WEIGHTS]
        if kind is not Format.SAFETENSORS:
            path = exported(client, job_id, path.parent, kind)
    out.print(harmless(f"{path}  {path.stat().st_size:,} bytes"), soft_wrap=True)


@app.command()
def cancel(job_id: JobId, url: Url = None, key_file: KeyFile = None) -> None:
    """Ask a job to stop; it saves a checkpoint first if it can."""
    with _client(url, key_file) as client:
        job = client.cancel(job_id)
    out.print(f"{job.id} is {job.status.phase}; desired: {job.desired_state}")


@app.command()
def train(
    file: SpecFile,
    run_dir: Annotated[
        Path, typer.Option(help="Where checkpoints and events go; a run that it holds is resumed.")
    ] = Path("run"),
    data_dir: Annotated[
        Path | None, typer.Option(envvar="NGD_DATA_DIR", help="Where relative data directories lie.")
    ] = None,
    secrets_dir: Annotated[
        Path | None, typer.Option(envvar="NGD_SECRETS_DIR", help="Folder with a file per secret that the job names.")
    ] = None,
) -> None:
    """Train in one process, without a service: python -m ngd_workers, which torchrun can run on several."""
    from ngd_service.settings import load_common_settings

    settings = load_common_settings()
    data_dir, secrets_dir = data_dir or settings.data_dir, secrets_dir or settings.secrets_dir
    command = [sys.executable, "-m", "ngd_workers", str(file), "--run-dir", str(run_dir)]
    command += ["--data-dir", str(data_dir)] if data_dir else []
    command += ["--secrets-dir", str(secrets_dir)] if secrets_dir else []
    try:
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _save(pieces: Iterable[bytes], output: Path) -> None:
    try:
        with output.open("wb") as file:
            file.writelines(pieces)
    except OSError as error:
        raise ServiceError(f"can't write {output}: {error.strerror}; give another --output") from error


def _spec(client: Client, file: Path | None, origin: str | None, settings: list[str]) -> Spec:
    """Returns the spec to submit: the file's text as it is, if nothing changes it, so that errors name its lines."""
    if file is None and origin is None:
        raise typer.BadParameter("give the file of a job, or another job with --from")
    if file is not None and origin is None and not settings:
        return _text(file)
    spec: dict[str, Any] = {} if file is None else load_mapping(file)
    if origin is not None:
        job_id, _, step = origin.partition("@")
        if step and not step.isdecimal():
            raise typer.BadParameter(f"--from takes JOB or JOB@STEP, got {origin!r}")
        other = continued(client.get(job_id), int(step) if step else None)
        spec = spec | {"init_from": other["init_from"]} if spec else other
    return with_settings(spec, settings)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"the spec {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as such"
        ) from error


def _client(url: str | None, key_file: Path | None) -> Client:
    from ngd_service.settings import load_client_settings, load_common_settings

    settings = load_client_settings()
    key_file = key_file or settings.api_key_file
    key = _key(key_file) if key_file else settings.api_key and settings.api_key.get_secret_value()
    return Client(url or settings.url or load_common_settings().url, key=key or None)


def _key(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise InvalidKeyError(
            f"can't read the API key in {file}: {reason}; check --key-file or NGD_API_KEY_FILE"
        ) from error


def _announce(settings: "Settings") -> None:
    reached = f"; people reach it at {settings.public_url}" if settings.public_url else ""
    out.print(f"ngd-dist serves on {settings.url}{reached}; its runs are in {settings.home}", soft_wrap=True)


def _complain(error: Exception) -> None:
    err.print(harmless(f"ngd: {error}"), style="red", soft_wrap=True)

"""The verb `ngd plan`: the cost of a job before it runs, on this machine alone; no service is asked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ngd_dist.cost.engines import ENGINES
from ngd_dist.cost.plan import Plan
from ngd_service.client.client import ServiceError
from ngd_service.client.plan_chart import svg
from ngd_service.client.plan_view import plan_text
from ngd_service.planning import plan_of, read_plan_request
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec_file import load_mapping, load_spec
from ngd_workers.contract.spec_problems import SpecProblemsError

__all__ = ["plan"]

out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)

File = typer.Argument(help="A job in YAML or JSON.", exists=True, dir_okay=False, readable=True)


class PlanError(ServiceError):
    """The job can't be planned; str() says why, and the way out."""


def plan(
    file: Annotated[Path, File],
    cluster: Annotated[
        Path | None, typer.Option(help="The machines in YAML: nodes, devices_per_node, device, inside, between.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help=f"In place of the job's engine: {', '.join(ENGINES)}.", show_default="the job's")
    ] = None,
    refresh_share: Annotated[
        float | None,
        typer.Option(help="Share of all statistics that an adaptive schedule refreshes.", show_default="0.2"),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Of the data, which are then not read: images:3x224x224:1000, tokens:50257x1024.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="In an epoch, with --shape.")] = None,
    card: Annotated[
        Path | None, typer.Option(help="The model's card, in place of the model.", exists=True, dir_okay=False)
    ] = None,
    write_card: Annotated[Path | None, typer.Option(help="Write the model's card to this file.")] = None,
    measure: Annotated[
        Path | None, typer.Option(help="Train for some seconds here, and write the times to this file.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Take the device's rates from such a file.", exists=True, dir_okay=False)
    ] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the scaling to this SVG file.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="NGD_DATA_DIR", help="Where relative data directories lie.")
    ] = None,
) -> None:
    """Count memory, bytes and time of a job before it runs, up to 1,024 ranks. Needs no service.

    A model that has no --card is built here, which needs torch; with --shape the data need not be here.
    """
    name = load_spec(file).name  # first: its problems are of the file's own lines
    if measure is not None:
        _write(measure, _described(file, data_dir, "--measure"))
        err.print(f"measured; the times are in {measure}: --calibrate {measure}", soft_wrap=True)
    if cluster is None and measure is None and write_card is None:
        raise typer.BadParameter("--cluster is missing: a file such as {nodes: 2, devices_per_node: 8, device: h100}")
    described = "" if cluster is None and write_card is None else _card(file, card, shape, samples, data_dir)
    if write_card is not None:
        _write(write_card, described)
    if cluster is None:
        return
    made = _planned(_request(file, cluster, described, calibrate, engine=engine, refresh_share=refresh_share))
    if plot is not None:
        _write(plot, svg(made, f"{name}: predicted scaling"))
    out.print(made.model_dump_json(indent=2) if is_json else plan_text(made, name), soft_wrap=True)


def _request(file: Path, cluster: Path, card: str, calibrate: Path | None, **options: object) -> dict[str, Any]:
    """Returns the body of a request for a plan; options that are None are left out."""
    files = {"job": load_mapping(file), "cluster": _mapping(cluster, "cluster"), "card": _json(card, "card")}
    measured = {} if calibrate is None else {"measured": _json(calibrate.read_text(), str(calibrate))}
    return files | measured | {name: value for name, value in options.items() if value is not None}


def _planned(request: dict[str, Any]) -> Plan:
    try:
        return plan_of(read_plan_request(request))
    except SpecProblemsError as error:
        raise PlanError("\n  ".join(str(problem) for problem in error.problems)) from error


def _card(file: Path, card: Path | None, shape: str | None, samples: int | None, data_dir: Path | None) -> str:
    """Returns the model's card as JSON: that of a file, or one made by a process that has torch."""
    if card is not None:
        return card.read_text()
    options = [] if shape is None else ["--shape", shape]
    if samples is not None:
        if shape is None:
            raise typer.BadParameter("--samples goes with --shape: data that are read tell their number")
        options += ["--samples", str(samples)]
    return _described(file, data_dir, *options)


def _described(file: Path, data_dir: Path | None, *options: str) -> str:
    command = [sys.executable, "-m", "ngd_workers.launch.model_card", str(file), *options]
    command += ["--data-dir", str(data_dir)] if data_dir else []
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise PlanError((ended.stderr.strip().splitlines() or ["the model could not be built; see --card"])[-1])
    return ended.stdout.splitlines()[-1]


def _mapping(path: Path, name: str) -> dict[str, Any]:
    try:
        return load_mapping(path)
    except SpecError as error:
        raise PlanError(str(error).replace("the spec", f"the {name}").replace("spec ", f"{name} ", 1)) from error


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PlanError(f"{name} is no JSON: {error}; write it again") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text if text.endswith("\n") else text + "\n")
    except OSError as error:
        raise PlanError(f"can't write {path}: {error.strerror}; give another file") from error

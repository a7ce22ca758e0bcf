"""Runs one rank of an attempt. Also the command that trains a spec without Ray or a service.

``python -m ngd_workers SPEC --run-dir DIR [--data-dir DIR] [--secrets-dir DIR]``, alone or under torchrun.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError

from ngd_dist.distributed.comm import Communicator, end_collectives
from ngd_workers.contract.errors import SpecError, StorageError, WorkerError
from ngd_workers.contract.events import Event, WorkersRestarted
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import EXIT_STATUS, AttemptDir, Facts, Outcome, read_json, write_json
from ngd_workers.contract.spec import AnySpec, LoopSpec
from ngd_workers.contract.spec_file import load_spec
from ngd_workers.contract.spec_problems import explain
from ngd_workers.launch.ending import conclude, failure, summary
from ngd_workers.launch.own_code import entered, variables
from ngd_workers.launch.signals import told_by_signals, with_signal
from ngd_workers.report.rank_log import kept_in
from ngd_workers.report.reporter import Reporter, SilentReporter, SpoolingReporter
from ngd_workers.train.context import TrainContext, device_of
from ngd_workers.train.loop import train
from ngd_workers.train.own_loop import train_own_loop

__all__ = ["main", "run_rank"]

READ_S = 30.0
RESTARTED = WorkersRestarted(message="the workers were started again after some of them died")
SAME_ON_RESUME = {"model", "data", "task", "optimizer", "transform", "schedule", "batch", "train", "seed"}


def run_rank(
    attempt_dir: AttemptDir, *, on_restart: Event = RESTARTED, is_told_to_end: Callable[[], bool] = lambda: False
) -> Outcome:
    """Collective over the default group, if there is one. Returns the attempt's outcome, the same on every rank.

    on_restart: reported first, if workers of this attempt have run before. is_told_to_end: whether this process is to
    end; then all ranks stop after the same step, with a checkpoint.
    """
    spec = insist(attempt_dir.read_spec, f"read {attempt_dir.spec}", patience_s=READ_S)
    facts = insist(attempt_dir.read_facts, f"read {attempt_dir.facts}", patience_s=READ_S)
    comm = Communicator()
    reporter: Reporter = SpoolingReporter(attempt_dir, on_restart=on_restart) if comm.rank == 0 else SilentReporter()
    is_broken = True  # until all ranks are known to end here
    try:
        if (fault := _fault(attempt_dir, comm)) is not None:
            is_broken = False
            return fault
        context = TrainContext(
            comm=comm,
            device=device_of(spec.resources),
            run_dir=facts.run_dir,
            data_dir=facts.data_dir,
            attempt=facts.attempt,
            reporter=reporter,
            is_told_to_end=is_told_to_end,
        )
        spec = _at(spec, comm.world_size)
        with kept_in(attempt_dir.rank_log(comm.rank)), entered(attempt_dir, spec, facts):
            outcome = train_own_loop(spec, context) if isinstance(spec, LoopSpec) else train(spec, context)
        is_broken = False
    except WorkerError as error:
        outcome = failure(error)
        is_broken = False
        if comm.world_size > 1 and not error.retryable:
            # The error of this rank alone ends the others with a broken collective, after which all start again.
            insist(lambda: write_json(attempt_dir.fault, outcome), f"write {attempt_dir.fault}", patience_s=READ_S)
    finally:
        try:
            end_collectives(is_broken=is_broken)
        finally:
            reporter.close()
    return outcome


def _fault(attempt_dir: AttemptDir, comm: Communicator) -> Outcome | None:
    """Returns the outcome of a rank that failed for good before the workers started again, the same on every rank."""
    if comm.world_size == 1:
        return None
    found = insist(lambda: read_json(attempt_dir.fault, Outcome), f"read {attempt_dir.fault}", patience_s=READ_S)
    return next((fault for fault in comm.all_gather_object("fault", found) if fault is not None), None)


def main() -> None:
    """Trains a spec in this process, or in those of torchrun, and exits with EXIT_STATUS."""
    parser = argparse.ArgumentParser(prog="python -m ngd_workers", description="Train a job without Ray.")
    parser.add_argument("spec", type=Path, help="the job in YAML or JSON")
    parser.add_argument(
        "--run-dir", type=Path, required=True, help="folder for checkpoints and events; a run that it holds is resumed"
    )
    parser.add_argument("--data-dir", type=Path, default=Path(), help="folder in which a relative data.directory lies")
    parser.add_argument("--secrets-dir", type=Path, help="folder with a file for each secret that the job names")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        outcome = _run_command(
            arguments.spec,
            arguments.run_dir.resolve(),
            data_dir=arguments.data_dir.resolve(),
            secrets_dir=arguments.secrets_dir and arguments.secrets_dir.resolve(),
        )
    except (SpecError, StorageError) as error:
        sys.exit(str(error))
    sys.exit(EXIT_STATUS[outcome.result])


def _run_command(spec_file: Path, run_dir: Path, **folders: Path | None) -> Outcome:
    spec = load_spec(spec_file)
    folders["code"] = _code_of(spec, spec_file)
    with variables(spec.env):  # NCCL and gloo read theirs when the group is made
        return _run_spec(spec, run_dir, folders)


def _run_spec(spec: AnySpec, run_dir: Path, folders: Mapping[str, Path | None]) -> Outcome:
    if dist.is_torchelastic_launched():
        device_of(spec.resources)  # before the first collective: NCCL takes the current device
        dist.init_process_group("nccl" if spec.resources.gpus_per_worker else "gloo")
    comm = Communicator()
    if comm.rank == 0 and spec.image is not None:
        logging.info("the image %s is not looked at: these processes run where they were started", spec.image)
    here = _at(spec, comm.world_size).model_copy(update={"image": None})
    attempt_dir = _next_attempt(here, run_dir, comm, folders)
    with told_by_signals(attempt_dir, signal.SIGTERM) as is_told_to_end:  # torchrun passes its own on
        outcome = run_rank(attempt_dir, is_told_to_end=is_told_to_end)
    if comm.rank == 0:
        outcome = with_signal(attempt_dir, outcome)
        conclude(attempt_dir, outcome)
        logging.info("%s", summary(outcome))
    if dist.is_initialized():
        dist.destroy_process_group()
    return outcome


def _at(spec: AnySpec, world_size: int) -> AnySpec:
    """Returns the spec with as many workers as there are processes. Raises: SpecError."""
    try:
        return spec.at(world_size)
    except ValidationError as error:
        problems = "; ".join(problem.detail for problem in explain(error, type(spec)))
        raise SpecError(f"the spec doesn't fit {world_size} processes: {problems}") from error
    except ValueError as error:
        raise SpecError(f"the spec doesn't fit {world_size} processes: {error}") from error


def _code_of(spec: AnySpec, spec_file: Path) -> Path | None:
    """Returns the folder of the job's code, which is used as it is. Raises: SpecError."""
    if spec.code is None:
        return None
    folder = (spec_file.parent / spec.code.directory).resolve()
    if not folder.is_dir():
        raise SpecError(f"code.directory is {spec.code.directory!r}, and there is no folder {folder}; correct it")
    return folder


def _next_attempt(spec: AnySpec, run_dir: Path, comm: Communicator, folders: Mapping[str, Path | None]) -> AttemptDir:
    number = torch.zeros(1, dtype=torch.int64, device=comm.device)
    if comm.rank == 0:
        number.fill_(1 + max((int(path.name) for path in run_dir.glob("attempts/*")), default=0))
    comm.broadcast("attempt number", number)
    attempt_dir = AttemptDir.of(run_dir, int(number))
    if number > 1:
        _check_same_job(AttemptDir.of(run_dir, int(number) - 1), spec)
    if comm.rank == 0:
        attempt_dir.path.mkdir(parents=True)
        (run_dir / ".gitignore").write_text("*\n")  # a folder of code that holds the run travels without it
        write_json(attempt_dir.spec, spec)
        write_json(attempt_dir.facts, _facts(spec, int(number), run_dir, folders))
    comm.barrier("attempt directory")
    return attempt_dir


def _check_same_job(earlier: AttemptDir, spec: AnySpec) -> None:
    before = earlier.read_spec()
    differing = sorted(name for name in SAME_ON_RESUME if getattr(before, name, None) != getattr(spec, name, None))
    if differing:
        raise SpecError(
            f"{earlier.path.parent.parent} holds a run that differs in {', '.join(differing)}; choose another --run-dir"
        )


def _facts(spec: AnySpec, number: int, run_dir: Path, folders: Mapping[str, Path | None]) -> Facts:
    return Facts(
        attempt_id=f"{spec.name}-a{number}",
        attempt=number,
        job_id=spec.name,
        url=None,
        token=None,
        run_dir=run_dir,
        data_dir=folders["data_dir"],
        code=folders["code"],
        secrets_dir=folders["secrets_dir"],
    )

"""Runs one attempt: ``python -m ngd_workers.launch ATTEMPT_DIR``. START HERE: `main`. The only user of Ray Train.

The driver does not need the service and may outlive it; its last act is to write outcome.json.
If the attempt has one worker and no given Ray cluster, this process trains; otherwise Ray's workers do.
Torch and Ray take seconds to import. They are imported late, so that a signal in that time ends the attempt in order.
"""

import argparse
import contextlib
import functools
import json
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ngd_workers.contract.errors import ClusterError, SpecError, StorageError, WorkerError
from ngd_workers.contract.events import Event, event
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import EXIT_STATUS, NOT_THE_FIRST, AttemptDir, Facts, Outcome, read_json
from ngd_workers.contract.spec import AnySpec, spec_class
from ngd_workers.contract.spec_problems import explain
from ngd_workers.launch.ending import conclude, failure, record, summary
from ngd_workers.launch.groups import GroupFailedError, NoRoomError, too_many, train_in_groups
from ngd_workers.launch.own_code import unpack
from ngd_workers.launch.ray_cluster import RayCluster, bundle
from ngd_workers.launch.signals import result_of, stop_in_order, with_signal

__all__ = ["main", "run_worker"]

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)

READ_S = 30.0  # NFS may show a new file late
RESTARTS = (
    "max_failures",
    "controller_failure_limit",
    "max_preemption_failures",
)  # Ray's own; older ones lack the last
STOPPED_BY = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    """Runs the attempt to its end and exits with EXIT_STATUS. If the attempt has ended before, nothing runs."""
    parser = argparse.ArgumentParser(
        prog="python -m ngd_workers.launch", description="Run one attempt of a job on Ray."
    )
    parser.add_argument("attempt_dir", type=Path)
    attempt_dir = AttemptDir(parser.parse_args().attempt_dir.resolve())
    if not attempt_dir.path.is_dir():
        parser.error(f"no attempt directory {attempt_dir.path}; the service makes it")
    _log_to_stderr()
    try:
        outcome = insist(attempt_dir.read_outcome, f"read {attempt_dir.outcome}", patience_s=READ_S)
        if outcome is None:
            _refuse_to_be_second(attempt_dir)
            stop_in_order(attempt_dir, STOPPED_BY)
            outcome = _run(attempt_dir)
            log.info("%s", summary(outcome))
    except StorageError as error:  # there is no outcome then: the service starts another attempt
        log.error("%s", error)
        sys.exit(EXIT_STATUS["failed"])
    sys.exit(EXIT_STATUS[outcome.result])


def run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Trains one rank, inside the process group that Ray Train made. Returns the outcome as a JSON object."""
    import ray
    import torch.distributed as dist

    from ngd_workers.launch.attempt import run_rank
    from ngd_workers.launch.ray_group import training

    _log_to_stderr(f"[rank {dist.get_rank()}] ")
    sys.path.append(config["started_in"])
    attempt_dir = AttemptDir(Path(config["attempt_dir"]))
    node = attempt_dir.nodes(config["group"]) / ray.get_runtime_context().get_node_id()
    insist(lambda: _touch(node), f"write {node}", patience_s=READ_S)
    try:
        with training():
            return run_rank(attempt_dir, on_restart=event.validate_python(config["on_restart"])).model_dump(mode="json")
    except Exception as error:  # mostly since another rank has died; then all ranks start again
        log.error("this rank stops: %s: %s", type(error).__name__, _last_line(error))
        raise


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _refuse_to_be_second(attempt_dir: AttemptDir) -> None:
    """Exits if another driver has begun the attempt: KubeRay starts a second driver after it has lost the head.

    The events of a second driver would be numbered from 1 and refused. The service's next attempt resumes the job.
    """
    try:
        facts = read_json(attempt_dir.facts, Facts)
    except (OSError, ValidationError):
        return  # _run puts it into the outcome
    if facts is None or facts.cluster == "own":
        return
    if not insist(attempt_dir.claim, f"write {attempt_dir.started}", patience_s=READ_S):
        log.error("%s was begun before; the service starts the next attempt", facts.attempt_id)
        sys.exit(NOT_THE_FIRST)


def _log_to_stderr(prefix: str = "") -> None:
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {prefix}%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request


def _run(attempt_dir: AttemptDir) -> Outcome:
    try:
        facts = _read(attempt_dir.facts, Facts)
    except WorkerError as error:
        outcome = failure(error)
        record(attempt_dir, outcome)  # the service's address stands in the unread file
        return outcome
    try:
        spec = _read_spec(attempt_dir)
        unpack(attempt_dir, spec, facts)
        outcome = _train(attempt_dir, spec, facts)
    except WorkerError as error:
        outcome = failure(error)
    except Exception as error:
        log.exception("the driver failed")
        outcome = failure(ClusterError(f"the driver failed with {type(error).__name__}: {_last_line(error)}"))
    outcome = with_signal(attempt_dir, outcome)
    conclude(attempt_dir, outcome)
    return outcome


def _read(path: Path, model: type[Model]) -> Model:
    def read() -> Model:
        content = read_json(path, model)
        if content is None:
            raise FileNotFoundError(f"no file {path}; the dispatcher writes it before it starts the driver")
        return content

    try:
        return insist(read, f"read {path}", patience_s=READ_S)
    except ValidationError as error:
        raise _invalid(path, error, model) from error


def _read_spec(attempt_dir: AttemptDir) -> AnySpec:
    path = attempt_dir.spec
    try:
        return insist(attempt_dir.read_spec, f"read {path}", patience_s=READ_S)
    except ValidationError as error:
        raise _invalid(path, error, spec_class(json.loads(path.read_bytes()))) from error
    except ValueError as error:
        raise SpecError(f"{path} is invalid: it is no JSON: {error}") from error


def _invalid(path: Path, error: ValidationError, model: type[BaseModel]) -> SpecError:
    return SpecError(f"{path} is invalid: " + "; ".join(problem.detail for problem in explain(error, model)))


def _train(attempt_dir: AttemptDir, spec: AnySpec, facts: Facts) -> Outcome:
    if facts.cluster == "own" and spec.resources.workers == 1:
        return _train_here(attempt_dir, spec, facts)
    return _train_on_ray(attempt_dir, spec, facts)


def _train_here(attempt_dir: AttemptDir, spec: AnySpec, facts: Facts) -> Outcome:
    from ngd_workers.launch.attempt import run_rank

    for restarts_left in range(spec.failure.worker_restarts, -1, -1):
        if _is_stopped(attempt_dir):
            return Outcome(result="cancelled", step=_saved_step(spec, facts))
        try:
            return run_rank(attempt_dir)
        except Exception as error:
            log.exception("the worker failed; the driver starts it again at most %d times", restarts_left)
            if not restarts_left:
                raise ClusterError(too_many(spec.failure.worker_restarts, _last_line(error))) from error
    raise AssertionError("the last round returns or raises")


def _train_on_ray(attempt_dir: AttemptDir, spec: AnySpec, facts: Facts) -> Outcome:
    # In the main thread Ray and Ray Train would take SIGTERM and SIGINT for themselves, and abort. The thread that
    # starts Ray must live until Ray is shut down: otherwise the shutdown ends the process silently.
    started_in = Path.cwd()
    elsewhere = _ray_dir(facts)
    elsewhere.mkdir(exist_ok=True, parents=True)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="ray") as thread,
        RayCluster(facts.cluster) as cluster,
        contextlib.chdir(elsewhere),  # Ray puts the driver's present folder first on its workers' path
    ):
        result_of(thread.submit(cluster.start, spec.resources))
        _log_to_stderr()  # again: Ray has put its own handler there
        stop_in_order(attempt_dir, STOPPED_BY)  # again: Ray's C++ part has taken SIGTERM
        cluster.check(spec)
        fit = functools.partial(_fit, attempt_dir, spec, facts, started_in)
        is_stopped = functools.partial(_is_stopped, attempt_dir)
        outcome = result_of(thread.submit(train_in_groups, attempt_dir, spec, cluster, fit, is_stopped))
        return outcome or Outcome(result="cancelled", step=_saved_step(spec, facts))


def _is_stopped(attempt_dir: AttemptDir) -> bool:
    return insist(attempt_dir.stop.exists, f"look for {attempt_dir.stop}", patience_s=READ_S)


def _fit(
    attempt_dir: AttemptDir, spec: AnySpec, facts: Facts, started_in: Path, group: int, size: int, on_restart: Event
) -> Outcome:
    """Trains one group of workers. Raises: GroupFailedError, NoRoomError."""
    from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from ngd_workers.launch.ray_group import GroupConfig

    resources = spec.resources
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={
            "attempt_dir": str(attempt_dir.path),
            "started_in": str(started_in),
            "group": group,
            "on_restart": on_restart.model_dump(mode="json"),
        },
        torch_config=GroupConfig(attempt_dir=str(attempt_dir.path), variables=spec.env),
        scaling_config=ScalingConfig(
            num_workers=size, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=bundle(resources)
        ),
        run_config=RunConfig(
            name=f"{facts.attempt_id}-g{group}",
            storage_path=str(_ray_dir(facts)),
            # Ray would start the workers again in the same number, for which there may be no room any more.
            failure_config=FailureConfig(**{name: 0 for name in RESTARTS if hasattr(FailureConfig, name)}),
            # Ray would log a traceback of each rank at each restart, and of its clean-up; `error` holds the last ones.
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        result = trainer.fit()
    except ControllerError as error:
        if not type(error.controller_failure).__name__.startswith("WorkerGroupStartup"):
            raise ClusterError(f"Ray failed: {_last_line(error)}") from error
        raise NoRoomError(f"Ray did not start {size} workers; it is tried again: {_last_line(error)}") from error
    except TrainingFailedError as error:
        failures: dict[int, Exception] = getattr(error, "worker_failures", {})
        is_preempted = any(getattr(failure, "preempted", False) for failure in failures.values())
        raise GroupFailedError(_causes(error), is_preempted=is_preempted) from error
    return Outcome.model_validate(result.return_value)


def _ray_dir(facts: Facts) -> Path:
    return facts.run_dir / "ray"


def _saved_step(spec: AnySpec, facts: Facts) -> int:
    from ngd_workers.train.checkpoints import Checkpoints

    return Checkpoints(facts.run_dir / "checkpoints", facts.attempt, spec.checkpoint.keep).newest_step()


def _causes(error: Exception) -> str:
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = [f"rank {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items())]
    return "; ".join(causes or [_last_line(error)])


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__

"""Attempt directories as the service would make them, and small specs to put there."""

from pathlib import Path
from typing import Any

from ngd_workers.contract.events import Event, Numbered, StepRecord
from ngd_workers.contract.rundir import AttemptDir, Facts, write_json
from ngd_workers.contract.spec import JobSpec


def small_spec(**changes: Any) -> JobSpec:
    """Returns a job on the digits that takes about a second; `changes` replace whole parts."""
    content: dict[str, Any] = {
        "name": "small",
        "model": {"kind": "mlp", "hidden": [32]},
        "data": {"kind": "digits"},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "schedule": {"steps": 8, "evaluate_every_steps": 4},
        "batch": {"global_size": 64},
        "checkpoint": {"every_steps": 2},
    }
    return JobSpec.model_validate(content | changes)


def fault_spec(name: str = "steps", steps: int = 20, **changes: Any) -> dict[str, Any]:
    """Returns the body of a job for the fault driver, which does what the name says."""
    return small_spec(name=name, schedule={"steps": steps}, **changes).model_dump(mode="json")


def make_attempt(run_dir: Path, spec: JobSpec, number: int = 1, **facts: Any) -> AttemptDir:
    """Returns the directory of an attempt that is ready to start; without a service unless `url` is given."""
    attempt_dir = AttemptDir.of(run_dir, number)
    attempt_dir.path.mkdir(parents=True)
    write_json(attempt_dir.spec, spec)
    write_facts(attempt_dir, run_dir, number, **facts)
    return attempt_dir


def write_facts(attempt_dir: AttemptDir, run_dir: Path, number: int = 1, **facts: Any) -> None:
    content = {"job_id": "j", "url": None, "token": "secret", "data_dir": None} | facts
    write_json(attempt_dir.facts, Facts(attempt_id=f"j-a{number}", attempt=number, run_dir=run_dir, **content))


def spooled(attempt_dir: AttemptDir) -> list[Event]:
    """Returns the events in the spool, whose seq has no gaps."""
    numbered = [Numbered.model_validate_json(line) for line in attempt_dir.spool.read_bytes().splitlines()]
    assert [entry.seq for entry in numbered] == list(range(1, len(numbered) + 1))
    return [entry.event for entry in numbered]


def records(events: list[Event]) -> list[StepRecord]:
    """Returns every step record in the events, in order."""
    return [record for event in events if event.kind == "steps" for record in event.records]

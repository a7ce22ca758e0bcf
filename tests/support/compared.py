"""Jobs to compare, that never ran."""

from datetime import UTC, datetime, timedelta

from ngd_service.client.comparison import History
from ngd_service.resources import Job, Metric, Progress, Status

START = datetime(2030, 1, 2, 12, tzinfo=UTC)
ACCURACY = Metric(name="accuracy", label="accuracy", better="higher", unit="share")


def run(phase: str, reached: tuple[int, float] | None, **changes: object) -> tuple[Job, History]:
    """Returns a job with a target, and its history. reached: the step that reached it, and seconds from the start."""
    tests = [(10, START + timedelta(seconds=1), {"accuracy": 0.5})]
    if reached is not None:
        tests.append((reached[0], START + timedelta(seconds=reached[1]), {"accuracy": 0.97}))
    job = Job(
        id="job_1",
        name="digits",
        spec={"target": {"metric": "accuracy", "value": 0.97}},
        desired_state="RUNNING",
        status=Status(
            phase=phase, is_terminal=phase == "SUCCEEDED", attempt=1, progress=Progress(step=90, total_steps=90)
        ),
        metrics=[ACCURACY],
        metrics_latest={},
        created_at=START,
        started_at=START,
        finished_at=None,
        resource_version=1,
    )
    return job.model_copy(update=changes), History(START, tests)

"""The history of a long job, stored as its worker would have sent it."""

from collections.abc import Iterator
from datetime import UTC, datetime

from ulid import ULID

from ngd_service.job_state import Action, Decision, Phase
from ngd_service.store.base import Claim, Store
from ngd_workers.contract.events import Evaluation, Metric, Numbered, Started, StepRecord, Steps
from tests.support.attempts import small_spec

BATCH = 512
METRICS = [
    Metric(name="accuracy", label="accuracy", better="higher", unit="share"),
    Metric(name="loss", label="loss", better="lower"),
]
PHASES = ("data", "forward_backward", "reduce", "refresh", "apply", "publish", "update", "evaluate")


def start_job(store: Store) -> Claim:
    """Returns a job that runs, with a live attempt."""
    now = datetime.now(UTC)
    store.create_job(f"job_{ULID()}", "long", small_spec(name="long").model_dump(mode="json"), now)
    (claim,) = store.claim(lease_token="history", now=now, lease_s=3600, max_running=100)
    assert store.apply(claim, Decision(Phase.STARTING, action=Action.NEW_ATTEMPT), now)
    store.release(claim)
    (claim,) = store.claim(lease_token="history", now=now, lease_s=3600, max_running=100)
    assert store.apply(claim, Decision(Phase.RUNNING), now)
    return claim


def tell(
    store: Store,
    attempt: str,
    num_steps: int,
    num_statistics: int = 2,
    *,
    first_seq: int = 1,
    total_steps: int = 0,
    evaluate_every: int = 1000,
) -> int:
    """Tells what a worker does from its start to this step; returns the next seq."""
    seq = first_seq
    started = Started(
        spec={},
        seed=0,
        commit=None,
        versions={},
        world_size=1,
        device="cpu",
        total_steps=total_steps or num_steps,
        steps_per_epoch=1000,
        parameters=1,
        resumed_step=0,
        statistics=[f"layer{i // 2}.{'AG'[i % 2]}" for i in range(num_statistics)],
        plain_parameters={},
        metrics=METRICS,
    )
    store.ingest(attempt, [numbered(seq, started)])
    for batch in _batches(num_steps, num_statistics):
        events: list[Numbered] = [numbered(seq + 1, Steps(records=batch))]
        for step in (record.step for record in batch if record.step % evaluate_every == 0):
            tested = Evaluation(step=step, epoch=step / 1000, metrics={"accuracy": 0.5, "loss": 1 / step})
            events.append(numbered(seq + 1 + len(events), tested))
        store.ingest(attempt, events)
        seq += len(events)
    return seq + 1


def long_record(step: int, num_statistics: int, loss: float | None = None) -> StepRecord:
    """Returns a step as a run with this many statistics reports it."""
    age = (step - 1) % 16
    return StepRecord.model_construct(
        step=step,
        epoch=step / 1000,
        time_s=1.7e9 + step / 10,
        metrics={
            "accuracy": (step % 89) / 89,
            "loss": 1.0 + 1 / step + (step % 17) / 1000 if loss is None else loss,
        },
        lr=0.1 / (1 + step / 1e6),
        samples_per_s=1234.5678 + step % 7,
        seconds={phase: 0.0123456 * (1 + (step + i) % 5) for i, phase in enumerate(PHASES)},
        bytes_sent={"gradients": 123456, "statistics": 234567 * (age == 0), "directions": 12345},
        ages=[age] * num_statistics,
        intervals=[16] * num_statistics,
        failed_inversions=0,
        skipped_samples=0,
        skipped_steps=0,
        damping=2.5e-4,
        momentum=None,
        reduction_ratio=None,
    )


def numbered(seq: int, event: Steps | Started | Evaluation) -> Numbered:
    return Numbered(seq=seq, time_s=1.7e9 + seq, event=event)


def _batches(num_steps: int, num_statistics: int) -> Iterator[list[StepRecord]]:
    for first in range(1, num_steps + 1, BATCH):
        yield [long_record(step, num_statistics) for step in range(first, min(first + BATCH, num_steps + 1))]

"""What does a change of nodes cost an elastic job?

An MLP trains on two workers, on a Ray cluster of a head and two nodes on this machine; a micro-batch takes 50 ms.
A node is drained, another added; a worker is killed; a node is killed; the head is killed, with the driver, and another
attempt goes on. Each line has the seconds without progress, from the last step before to the first step that was not
done before, and the steps that were done again. The driver looks at the cluster each second here, not each ten.

    python -m benchmarks.elastic            # five minutes
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import folder_for, write
from ngd_workers.contract.events import Event, StepRecord
from tests.support.three_nodes import EVERY_STEPS, ElasticJob, add_node, three_nodes

AFTER = (
    3 * EVERY_STEPS + EVERY_STEPS // 2
)  # steps of a group before the next change, which comes between two checkpoints


@dataclass(frozen=True)
class Cost:
    """A change of the cluster: seconds without progress, steps that were done again, sizes before and after."""

    change: str
    seconds: float
    steps_again: int
    before: int
    after: int


def groups_of(events: Sequence[Event]) -> list[list[StepRecord]]:
    """Returns the steps of each group of workers."""
    found: list[list[StepRecord]] = []
    for event in events:
        if event.kind == "started":
            found.append([])
        elif event.kind == "steps":
            found[-1].extend(event.records)
    return found


def cost(change: str, before: Sequence[StepRecord], after: Sequence[StepRecord], sizes: tuple[int, int]) -> Cost:
    """Returns the cost of a change between two groups. sizes: of both."""
    last = before[-1]
    first_new = next(record for record in after if record.step > last.step)
    return Cost(change, round(first_new.time_s - last.time_s, 1), last.step - after[0].step + 1, *sizes)


def change(name: str, job: ElasticJob, act: Callable[[], object]) -> Cost:
    """Makes a change, and waits until the next group has done more than was done before."""
    group = len(job.starts)
    act()
    job.reaches(group + 1, steps=AFTER)
    before, after = groups_of(job.events)[group - 1 : group + 1]
    return cost(name, before, after, (job.starts[-2].world_size, job.starts[-1].world_size))


def measure(folder: Path) -> list[Cost]:
    """Returns the cost of each kind of change."""
    with three_nodes(folder) as (head, [_, two]), ElasticJob(folder / "run", head) as job:
        job.reaches(1)
        added: list[str] = []
        costs = [change("a node is drained", job, lambda: head.drain_node(two))]
        costs.append(change("a node is added", job, lambda: added.append(add_node(head, folder, "three"))))
        three = added[-1]
        costs.append(change("a worker is killed", job, lambda: head.kill_worker(three)))
        costs.append(change("a node is killed", job, lambda: head.kill_node(three)))
        before, size = groups_of(job.events)[-1], job.starts[-1].world_size
        # The driver ends with the head, as it does on the machine of the head.
    (folder / "next").mkdir()
    with three_nodes(folder / "next") as (head, _), ElasticJob(folder / "run", head, attempt=2) as again:
        start = again.reaches(1, steps=AFTER)
        after = groups_of(again.events)[0]
        costs.append(cost("the head is killed", before, after, (size, start.world_size)))
    return costs


def table(costs: Sequence[Cost]) -> str:
    rows = [f"| {c.change} | {c.before} | {c.after} | {c.seconds:.0f} | {c.steps_again} |" for c in costs]
    return "\n".join(
        [
            "# What a change of nodes costs an elastic job",
            "",
            f"Checkpoints each {EVERY_STEPS} steps. The last line has the start of another head and two nodes in it.",
            "",
            "| change | workers before | after | s without progress | steps done again |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ngd-", dir="/tmp") as folder:
        costs = measure(Path(folder))
    text = table(costs)
    print(text)
    write(folder_for("elastic", "cpu2"), {"costs": [asdict(one) for one in costs]}, text)


if __name__ == "__main__":
    main()

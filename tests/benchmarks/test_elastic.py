"""The arithmetic of what a change of nodes costs; the measuring itself takes a Ray cluster and minutes."""

from benchmarks.elastic import Cost, cost, groups_of, table
from ngd_workers.contract.events import Started, StepRecord, Steps
from tests.support.fault_driver import METRICS


def at(step: int, time_s: float) -> StepRecord:
    return StepRecord(step=step, time_s=time_s, metrics={"loss": 1.0})


def test_progress_begins_with_the_first_step_that_was_not_done_before() -> None:
    before, after = [at(9, 100.0), at(10, 101.0)], [at(9, 120.0), at(10, 121.0), at(11, 122.5)]

    assert cost("a node is killed", before, after, (2, 1)) == Cost("a node is killed", 21.5, 2, 2, 1)
    assert cost("a node is drained", before, [at(11, 120.0)], (2, 1)).steps_again == 0


def test_steps_are_told_apart_by_the_starts_between_them() -> None:
    start = Started(
        spec={}, seed=0, commit=None, versions={}, world_size=1, device="cpu", total_steps=9, steps_per_epoch=1,
        parameters=1, resumed_step=0, statistics=[], plain_parameters={}, metrics=METRICS,
    )  # fmt: skip
    events = [start, Steps(records=[at(1, 1.0)]), Steps(records=[at(2, 2.0)]), start, Steps(records=[at(2, 9.0)])]

    assert [[record.time_s for record in group] for group in groups_of(events)] == [[1.0, 2.0], [9.0]]


def test_table_has_a_line_for_each_change() -> None:
    assert "| a node is killed | 2 | 1 | 22 | 2 |" in table([Cost("a node is killed", 21.5, 2, 2, 1)])

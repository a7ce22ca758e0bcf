"""Curves and matrices lose nothing that a reader would miss when they are thinned out."""

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngd_service.api.series import curves, spans_for, statistics
from ngd_service.store.spans import KINDS, Name, Span, Spans, fold, ladder, level_for
from ngd_workers.contract.events import Judged, StepRecord
from tests.support.fault_driver import step_record

numbers = st.floats(allow_nan=True, allow_infinity=True)


def records(count: int) -> list[StepRecord]:
    return [step_record(step) for step in range(1, count + 1)]


def spans(name: Name, of: Sequence[StepRecord], level: int = 0) -> Spans:
    """What a store keeps of these steps, through JSON and through every level on the way."""
    kind = KINDS[name]
    alone = [Span(record.step, kind.of_record(json.loads(record.model_dump_json()))) for record in of]
    folded = alone
    for step in range(level):
        folded = fold(kind, folded, step + 1)
    return Spans(1 << level, len(of), folded, (alone[0], alone[-1]) if level and alone else ())


def losses(values: Sequence[float]) -> list[StepRecord]:
    return [step_record(step, value) for step, value in enumerate(values, start=1)]


@given(st.lists(numbers, min_size=1, max_size=300), st.integers(1, 6))
def test_thinned_curve_keeps_its_ends_its_extremes_and_its_size(values: list[float], level: int) -> None:
    thinned = curves(spans("curves", losses(values), level), {"loss"})["loss"]

    num_spans = -(-len(values) // 2**level)
    assert len(thinned.steps) == len(thinned.values) <= 2 * num_spans + 2
    assert {1, len(values)} <= set(thinned.steps)
    assert all(str(values[step - 1]) == str(value) for step, value in zip(thinned.steps, thinned.values, strict=True))
    if all(math.isfinite(value) for value in values):
        assert (min(thinned.values), max(thinned.values)) == (min(values), max(values))


@given(st.lists(numbers, min_size=1, max_size=100), st.integers(1, 6))
def test_each_span_with_a_value_that_is_not_finite_shows_it(values: list[float], level: int) -> None:
    thinned = curves(spans("curves", losses(values), level), {"loss"})["loss"]

    def lost_spans(steps: Sequence[int], of: Sequence[float]) -> set[int]:
        return {(step - 1) >> level for step, value in zip(steps, of, strict=True) if not math.isfinite(value)}

    assert lost_spans(thinned.steps, thinned.values) == lost_spans(range(1, len(values) + 1), values)


@given(st.integers(1, 10**7), st.integers(0, 10**7), st.integers(10, 5_000), st.sampled_from([1, 8, 1024]))
def test_level_is_the_finest_that_fits(first: int, more: int, most: int, width: int) -> None:
    last = first + more

    level = level_for(first, last, most, width)

    def num_spans(level: int) -> int:
        return ((last - 1) >> level) - ((first - 1) >> level) + 1

    assert num_spans(level) <= most
    assert level == 0 or 2 ** (level - 1) < width or num_spans(level - 1) > most


def test_ladder_ends_where_one_span_holds_all() -> None:
    assert ladder(1) == [3]
    assert ladder(8) == [3]
    assert ladder(9) == [3, 5]
    assert ladder(1_000_000) == [3, 5, 7, 9, 11, 13, 15, 17, 19, 21]


@pytest.mark.parametrize("max_points", [10, 11, 1000])
def test_spans_for_a_curve_leave_room_for_its_ends(max_points: int) -> None:
    assert 2 * spans_for(max_points) + 2 <= max_points


def test_a_group_name_stands_for_all_of_its_parts() -> None:
    assert set(curves(spans("curves", records(3)), {"seconds"})) == {"seconds.data", "seconds.forward_backward"}
    assert set(curves(spans("curves", records(3)), {"seconds.data"})) == {"seconds.data"}


def test_steps_that_lack_a_value_are_left_out_of_its_curve() -> None:
    of_record = KINDS["curves"].of_record
    old, new = json.loads(records(1)[0].model_dump_json()), json.loads(records(2)[1].model_dump_json())
    del old["damping"], old["skipped_steps"]  # of a version that did not record them

    known = Spans(1, 2, [Span(1, of_record(old)), Span(2, of_record(new | {"damping": 0.5}))])

    series = curves(known, {"lr", "damping"})
    assert (series["lr"].steps, series["damping"].steps, series["damping"].values) == ([1, 2], [2], [0.5])


def test_a_value_that_no_step_has_gives_no_curve() -> None:
    assert set(curves(spans("curves", records(3)), {"loss", "momentum"})) == {"loss"}


def test_refreshes_between_two_columns_are_counted() -> None:
    matrix = statistics(["A", "G"], spans("statistics", records(12), 2))

    assert (matrix.steps, matrix.span) == ([4, 8, 12], 4)
    assert matrix.ages == [[3, 3, 3], [1, 1, 1]]
    assert matrix.refreshes == [[1, 1, 1], [2, 2, 2]]


def test_columns_of_another_set_of_statistics_are_left_out() -> None:
    other = [record.model_copy(update={"ages": [0], "intervals": [1]}) for record in records(6)]

    matrix = statistics(["A", "G"], spans("statistics", [*other, *records(12)[6:]], 2))

    assert (matrix.steps, matrix.refreshes) == ([8, 12], [[0, 1], [1, 2]])


def test_job_without_steps_has_an_empty_matrix() -> None:
    matrix = statistics(["A"], Spans(1, 0, []))

    assert (matrix.steps, matrix.ages, matrix.last_step) == ([], [[]], 0)


def test_thinned_parts_of_a_group_keep_the_same_steps_and_the_peaks_of_their_sum() -> None:
    busy = [r.model_copy(update={"seconds": {"data": r.step % 7, "refresh": r.step % 5}}) for r in records(200)]
    busy[100] = busy[100].model_copy(update={"seconds": {"data": 99.0}})

    series = curves(spans("curves", busy, 5), {"seconds"})

    data, refresh = series["seconds.data"], series["seconds.refresh"]
    assert data.steps == refresh.steps
    assert len(data.steps) <= 2 * 7 + 2
    assert (data.values[data.steps.index(101)], refresh.values[refresh.steps.index(101)]) == (99.0, 0.0)


def test_each_column_has_the_newest_judgement_of_each_statistic() -> None:
    def judged(step: int) -> StepRecord:
        failed = {1: "INACCURATE"} if step == 2 else {}
        told = Judged(
            statistics=[step % 2], changes=[step / 10], noises=[0.1], thresholds=[0.2], errors=[None], failed=failed
        )
        return step_record(step).model_copy(update={"judged": told if step <= 3 else None})

    of_steps = [judged(step) for step in range(1, 9)]
    matrix = statistics(["A", "G"], spans("statistics", of_steps, 2), with_judged=True)

    assert matrix.judged is not None
    assert matrix.judged.changes == [[0.2, None], [0.3, None]]
    assert matrix.judged.endings == [[None, None], ["INACCURATE", None]]
    assert statistics(["A", "G"], spans("statistics", records(8), 2), with_judged=True).judged is None

"""Curves and matrices lose nothing that a reader would miss when they are thinned out."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from service.series import curves, statistics, thin
from service.store.base import PointRecord
from tests.support.fault_driver import step_record

numbers = st.floats(allow_nan=True, allow_infinity=True)


def points(count: int) -> list[PointRecord]:
    return [PointRecord(step, step_record(step).model_dump_json()) for step in range(1, count + 1)]


@given(st.lists(numbers, max_size=300), st.integers(10, 100))
def test_thinned_curve_keeps_its_ends_its_extremes_and_its_size(values: list[float], max_points: int) -> None:
    steps = list(range(1, len(values) + 1))

    series = thin(steps, values, max_points=max_points)

    assert len(series.steps) == len(series.values) <= max_points
    assert series.steps[:1] + series.steps[-1:] == steps[:1] + steps[-1:]
    assert all(str(values[step - 1]) == str(value) for step, value in zip(series.steps, series.values, strict=True))
    if values and all(math.isfinite(value) for value in values):
        assert (min(series.values), max(series.values)) == (min(values), max(values))


def test_value_that_is_not_finite_is_never_dropped() -> None:
    values = [1.0] * 1000
    values[437] = math.nan

    assert any(math.isnan(value) for value in thin(list(range(1000)), values, max_points=20).values)


def test_short_curve_is_left_as_it_is() -> None:
    assert thin([1, 2], [3.0, 4.0], max_points=10).values == [3.0, 4.0]


def test_a_group_name_stands_for_all_of_its_parts() -> None:
    assert set(curves(points(3), [], {"seconds"}, 10)) == {"seconds.data", "seconds.forward_backward"}


def test_evaluations_have_steps_of_their_own() -> None:
    tested = PointRecord(2, json.dumps({"step": 2, "test_loss": "NaN", "test_accuracy": 0.5}))

    series = curves(points(3), [tested], {"test_loss", "loss"}, 10)

    assert (series["loss"].steps, series["test_loss"].steps) == ([1, 2, 3], [2])
    assert math.isnan(series["test_loss"].values[0])


def test_steps_that_lack_a_value_are_left_out_of_its_curve() -> None:
    old, new = json.loads(points(1)[0].json), json.loads(points(2)[1].json) | {"damping": 0.5}
    del old["damping"], old["skipped_steps"]  # of a version that did not record them

    series = curves([PointRecord(1, json.dumps(old)), PointRecord(2, json.dumps(new))], [], {"lr", "damping"}, 10)

    assert (series["lr"].steps, series["damping"].steps, series["damping"].values) == ([1, 2], [2], [0.5])


def test_a_value_that_no_step_has_gives_no_curve() -> None:
    assert set(curves(points(3), [], {"loss", "momentum"}, 10)) == {"loss"}


def test_refreshes_between_two_columns_are_counted() -> None:
    matrix = statistics(["A", "G"], points(12), 3)

    assert matrix.steps == [4, 8, 12]
    assert matrix.ages == [[3, 3, 3], [1, 1, 1]]
    assert matrix.refreshes == [[1, 1, 1], [2, 2, 2]]


def test_job_without_steps_has_an_empty_matrix() -> None:
    matrix = statistics(["A"], [], 100)

    assert (matrix.steps, matrix.ages, matrix.last_step) == ([], [[]], 0)


def test_thinned_parts_of_a_group_keep_the_same_steps_and_the_peaks_of_their_sum() -> None:
    records = [
        PointRecord(p.step, json.dumps(json.loads(p.json) | {"seconds": {"data": p.step % 7, "refresh": p.step % 5}}))
        for p in points(200)
    ]
    records[100] = PointRecord(101, json.dumps(json.loads(records[100].json) | {"seconds": {"data": 99.0}}))

    series = curves(records, [], {"seconds"}, 20)

    data, refresh = series["seconds.data"], series["seconds.refresh"]
    assert data.steps == refresh.steps
    assert len(data.steps) <= 20
    assert (data.values[data.steps.index(101)], refresh.values[refresh.steps.index(101)]) == (99.0, 0.0)

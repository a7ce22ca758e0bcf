"""What the panels of a job's page make of what they read: stages, phases, colours of a log, outliers, averages."""

import asyncio
import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from nicegui import Client
from starlette.datastructures import QueryParams

from ngd_service.dashboard.anatomy import Anatomy, quantile
from ngd_service.dashboard.ansi import as_html
from ngd_service.dashboard.curves import Curve, Curves
from ngd_service.dashboard.environment import by_reason
from ngd_service.dashboard.log_search import around_first_error, first_error, matches
from ngd_service.dashboard.smoothing import range_without_outliers, smoothed
from ngd_service.dashboard.timeline import stages
from ngd_service.dashboard.trouble import around_last_error
from ngd_service.dashboard.trust import Trust
from ngd_service.dashboard.view import MOST_SMOOTHING, View
from ngd_service.resources import Event, Metrics, Series

NOW = datetime(2030, 1, 2, 12, tzinfo=UTC)


def at(second: int, kind: str, attempt: int | None = 1, **data: Any) -> Event:
    time = NOW + timedelta(seconds=second)
    return Event(id=second, job_id="job_1", attempt=attempt, seq=1, kind=kind, time=time, data=data)


def test_average_begins_at_the_first_point_and_passes_over_what_is_not_finite() -> None:
    drawn = smoothed([(1, 2.0), (2, math.nan), (3, 4.0)], 0.5)

    assert drawn[0] == (1, 2.0)
    assert math.isnan(drawn[1][1])
    assert drawn[2] == (3, pytest.approx((0.25 * 2 + 0.5 * 4) / 0.75))


@pytest.mark.parametrize(
    ("values", "is_kept"),
    [
        ([1.0] * 20 + [500.0] + [1.5] * 20, False),
        ([2.3, 1.0, 0.5, *[0.1] * 60], True),  # falls fast at its start
        ([*[0.1] * 60, 5.0], True),  # runs away at its end
        ([1.0, 2.0, 3.0], True),
        ([1.0] * 50, True),
        ([], True),
        ([math.nan, 1.0, math.inf], True),
    ],
)
def test_axis_leaves_out_spikes_and_keeps_both_ends(values: list[float], is_kept: bool) -> None:
    shown = range_without_outliers([list(enumerate(values))])

    assert (shown is None or shown[1] >= max(values)) == is_kept


def test_stages_follow_the_attempts_and_the_starts_of_their_workers() -> None:
    told = stages(
        [
            at(0, "phase", None, to="QUEUED"),
            at(1, "phase", to="STARTING"),
            at(3, "started"),
            at(4, "phase", to="RUNNING"),
            at(5, "workers_restarted"),
            at(6, "started"),
            at(7, "phase", to="RECOVERING"),
            at(8, "phase", 2, to="STARTING"),
            at(9, "started", 2),
            at(12, "phase", 2, to="SUCCEEDED"),
        ]
    )

    rows = [(stage.attempt, stage.kind, (stage.start - NOW).seconds) for stage in told]
    assert rows == [
        (0, "QUEUED", 0), (1, "STARTING", 1), (1, "TRAINING", 3), (1, "STARTING", 5), (1, "TRAINING", 6),
        (1, "RECOVERING", 7), (2, "STARTING", 8), (2, "TRAINING", 9),
    ]  # fmt: skip
    assert told[-1].end == NOW + timedelta(seconds=12)
    assert stages([at(0, "phase", None, to="QUEUED")])[0].end is None


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m plain", '<span class="ansi-c1">red</span> plain'),
        ("\x1b[1;32mg\x1b[39mb\x1b[m", '<span class="ansi-bold ansi-c2">g</span><span class="ansi-bold">b</span>'),
        ("\x1b[2Kdone\x1b]0;title\x07\x08", "done"),
        ("\x1b[38;5;9mx\x1b[0m", "x"),
    ],
)  # fmt: skip
def test_colours_of_a_terminal_become_spans(line: str, shown: str) -> None:
    assert as_html(line) == shown


def test_error_is_found_in_a_log() -> None:
    lines = ["step 1", "errors 0", "Traceback (most recent call last):", "ValueError: x", *["step"] * 20]

    assert first_error(lines) == 2
    assert around_last_error(lines) == lines[:7]
    assert around_last_error(["a", "b"]) == ["a", "b"]
    assert around_last_error([]) == []


async def _parts(*parts: list[str]) -> AsyncIterator[list[str]]:
    for part in parts:
        yield part


def test_text_and_first_error_are_found_beyond_a_part_of_a_log() -> None:
    parts = [[f"step {i}" for i in range(start, start + 100)] for start in (0, 100, 200)]
    parts[1][50] = "ValueError: x"

    found = asyncio.run(matches(_parts(*parts), "STEP 1", 5))
    assert (found.num_matching, found.num_lines) == (110, 300)  # 1, 10 to 19 and 100 to 199, of which one is the error
    assert list(found.lines) == [f"step {i}" for i in range(195, 200)]
    lines, place, number = asyncio.run(around_first_error(_parts(*parts), 20, 120)) or ([], 0, 0)
    assert (lines[place], number, len(lines)) == ("ValueError: x", 151, 120)
    assert (lines[0], lines[-1]) == ("step 130", "step 249")
    assert asyncio.run(around_first_error(_parts(parts[0]), 20, 120)) is None


@pytest.mark.usefixtures("page")
def test_phases_have_their_median_and_their_slow_end() -> None:
    anatomy = Anatomy()
    steps = list(range(1, 101))
    seconds = {"seconds.data": [0.001 * step for step in steps], "seconds.apply": [0.002] * 100}

    anatomy.add(Metrics(series={n: Series(steps=steps, values=v) for n, v in seconds.items()}, last_step=100), now=True)

    assert [(row["phase"], row["p50"], row["p95"]) for row in anatomy.table.rows] == [
        ("data", "50 ms", "95 ms"),
        ("apply", "2 ms", "2 ms"),
    ]
    assert quantile([3.0], 0.95) == 3.0


@pytest.mark.usefixtures("page")
def test_phases_of_steps_that_are_done_again_count_once() -> None:
    anatomy = Anatomy()
    told = Metrics(series={"seconds.data": Series(steps=[1, 2, 3], values=[1.0, 1.0, 1.0])}, last_step=3)
    anatomy.add(told)
    anatomy.add(told)

    assert len(anatomy.steps) == 3
    anatomy.redo(1)
    anatomy.add(told)
    assert (len(anatomy.steps), anatomy.last_step) == (2, 3)


def test_view_of_an_address() -> None:
    view = View.of(QueryParams("smooth=2&from=3&to=9&log=Loss&linear=RMSE&follow=on&outliers=shown"))

    assert (view.smoothing, view.window, view.axes) == (MOST_SMOOTHING, (3, 9), {"Loss": True, "RMSE": False})
    assert (view.follows, view.ignores_outliers) == (True, False)
    assert View.of(QueryParams("from=nan&to=1e999&smooth=x")) == View()


@pytest.mark.usefixtures("page")
def test_smoothed_curve_grows_by_its_new_points() -> None:
    curves = Curves("Loss", curves={"loss": Curve("training", may_be_smooth=True)}, view=View(smoothing=0.5))
    curves.replace({"loss": [(1, 1.0)]})

    script = curves.extend({"loss": [(2, 4.0)]})

    assert "[1,[[2,3]]],[1,[[2,4]]],[0,[]]" in script


@pytest.mark.usefixtures("page")
def test_numbers_are_saved_in_the_order_of_the_steps() -> None:
    curves = Curves("Loss", curves={"loss": Curve("training"), "test_loss": Curve("test")})
    curves.replace({"loss": [(1, 2.5), (2, math.nan)], "test_loss": [(2, 1.5)]})

    assert curves.csv() == "step,training,test\n1,2.5,\n2,nan,1.5\n"


def test_rows_of_trust_come_with_their_points(page: Client) -> None:
    trust = Trust(View())
    trust.replace({"damping": [(1, 0.1)], "failed_inversions": [(1, 0.0)], "skipped_steps": [(1, 0.0)]})
    before = [grid["height"] > 0 for grid in trust.chart.options["grid"]]

    trust.extend({"damping": [(5, 0.1)], "reduction_ratio": [(5, 3.0)]})

    rows = [False, True, *[False] * 4, True, True]  # ratio, damping, what is told of layers, counts; marks over all
    assert (before, trust.chart.options["grid"][0]["height"] > 0) == (rows, True)
    assert [axis["max"] for axis in trust.chart.options["xAxis"]] == [5] * len(rows)
    assert trust.chart.options["yAxis"][0]["max"] == 3.0
    assert "within 0.25 to 2 at 0 of 1 points" in trust.note.text


def test_parameters_of_the_fallback_are_grouped_by_their_reason() -> None:
    assert by_reason({"a": "x", "b": "y", "c": "y"}) == {"y": ["b", "c"], "x": ["a"]}

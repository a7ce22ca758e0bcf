"""What the dashboard shows, from what the API says: words, numbers, marks and the data of its charts."""

import asyncio
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from nicegui import Client, ui
from nicegui.events import ClickEventArguments, handle_event

from ngd_service.client.units import ago, binary_bytes, counted, duration, moment, number, percent
from ngd_service.dashboard.activity import MOST_EVENTS, EventPanel, words
from ngd_service.dashboard.curves import Curve, Curves
from ngd_service.dashboard.heat_map import CELLS_PER_STEP, MAX_CELLS, HeatMap, columns_for, span_for
from ngd_service.dashboard.jobs import row
from ngd_service.dashboard.logs import unseen
from ngd_service.dashboard.marks import Mark, marks
from ngd_service.dashboard.measures import BYTES
from ngd_service.dashboard.mounting import _failed
from ngd_service.dashboard.smoothing import aligned
from ngd_service.dashboard.view import View
from ngd_service.resources import Event, Job, Metric, Metrics, Progress, Series, Statistics, Status
from ngd_service.store.spans import GROUPS
from tests.support.laid_out import laid_out

NOW = datetime(2030, 1, 2, 12, tzinfo=UTC)
ACCURACY = Metric(name="accuracy", label="accuracy", better="higher", unit="share")
LOSS = Metric(name="loss", label="loss", better="lower")
CLASSIFIES = (ACCURACY, LOSS)


def event(kind: str, attempt: int | None = 1, **data: Any) -> Event:
    return Event(id=1, job_id="job_1", attempt=attempt, seq=1, kind=kind, time=NOW, data=data)


def job(
    phase: str, *, step: int = 0, total: int | None = None, metrics: Sequence[Metric] = CLASSIFIES, **latest: float
) -> Job:
    return Job(
        id="job_1",
        name="digits",
        spec={},
        desired_state="RUNNING",
        status=Status(
            phase=phase,
            is_terminal=phase == "SUCCEEDED",
            attempt=1,
            progress=Progress(step=step, total_steps=total, eta_s=90.0),
        ),
        metrics=list(metrics),
        metrics_latest=latest,
        created_at=NOW - timedelta(minutes=5),
        started_at=None,
        finished_at=None,
        resource_version=1,
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.123456), "0.1235"),
        (number(12345.6), "12,346"),
        (number(3.0), "3"),
        (number(1e9), "1e+09"),
        (number(-44_295_377_649_664.0), "-4.43e+13"),
        (counted(1, "worker"), "1 worker"),
        (counted(1_000, "sample"), "1,000 samples"),
        (number(math.nan), "not a number"),
        (number(-math.inf), "infinite"),
        (number(None), "—"),
        (percent(0.98765), "98.77%"),
        (percent(math.nan), "—"),
        (duration(59.7), "1 min 00 s"),
        (duration(3_900), "1 h 05 min"),
        (duration(90_000), "1 d 01 h"),
        (duration(None), "—"),
        (ago(NOW - timedelta(seconds=9), NOW), "just now"),
        (ago(NOW - timedelta(seconds=59), NOW), "50 s ago"),
        (ago(NOW - timedelta(hours=25), NOW), "1 d ago"),
        (moment(datetime(2030, 1, 2, 1, 30, tzinfo=timezone(timedelta(hours=2)))), "2030-01-01 23:30:00"),
        (binary_bytes(0), "0 B"),
        (binary_bytes(1536), "1.5 KiB"),
        (binary_bytes(2**60), "1024 PiB"),
    ],
)
def test_numbers_are_written_for_people(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("shown", "tail", "new"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["a", "b"], ["a", "b"], []),
        (["a", "b"], ["b", "c"], ["c"]),
        (["a", "a"], ["a", "a", "a"], ["a"]),
        (["a", "b"], ["x", "y"], ["x", "y"]),
        (["a", "b", "c"], ["c"], []),
    ],
)
def test_log_gets_only_lines_that_it_does_not_show(shown: list[str], tail: list[str], new: list[str]) -> None:
    assert unseen(shown, tail) == new


def test_marks_tell_new_attempts_from_restarts_of_the_workers() -> None:
    events = [
        event("started", resumed_step=0),
        event("checkpoint", step=50),
        event("started", resumed_step=50),
        event("started", attempt=2, resumed_step=100),
    ]

    expected = [
        Mark(50, "checkpoint", "checkpoint 50"),
        Mark(50, "restart", "restart"),
        Mark(100, "attempt", "attempt 2"),
    ]
    assert marks(events) == (expected, 2)
    early, attempt = marks(events[:2])
    assert early + marks(events[2:], attempt)[0] == expected  # as they come in, not all at once


@pytest.mark.parametrize(
    ("happened", "sentence"),
    [
        (
            event("phase", None, **{"from": "RUNNING", "to": "FAILED", "reason": "R", "message": "no data"}),
            "Failed: no data",
        ),
        (event("phase", None, **{"from": None, "to": "QUEUED", "reason": None, "message": None}), "Queued"),
        (
            event("evaluation", step=10, metrics={"loss": "NaN", "accuracy": "NaN"}),
            "Tested at step 10: accuracy —, loss not a number",
        ),
        (
            event("target_reached", step=10, metrics={"accuracy": 0.98}),
            "Target reached at step 10: test accuracy 98.00%",
        ),
        (event("done", step=10, metrics={"accuracy": 0.98, "mine": 2.0}), "step 10: test accuracy 98.00%, mine 2"),
        (event("done", step=10, metrics={}), "Done at step 10"),
        (
            event("started", world_size=1, device="cpu", resumed_step=0, statistics=[]),
            "Attempt 1: 1 worker on cpu started",
        ),
        (
            event("workers_resized", before=2, after=1, message="to be taken away: node 10.0.0.7"),
            "Resized from 2 to 1 worker: to be taken away: node 10.0.0.7",
        ),
        (event("checkpoint", step=1500, bytes=2048, path="c"), "Checkpoint of step 1,500 saved (2 KiB)"),
        (event("a_kind_of_a_later_version"), "A kind of a later version"),
    ],
)
def test_events_are_told_in_sentences(happened: Event, sentence: str) -> None:
    assert words(happened, CLASSIFIES).endswith(sentence)


def test_row_of_a_running_job_has_progress_result_and_time_left() -> None:
    shown = row(job("RUNNING", step=30, total=120, loss=0.5, test_accuracy=0.9))

    assert (shown["share"], shown["steps"], shown["result"]) == (0.25, "30 / 120", "accuracy 90.00%")
    assert (shown["word"], shown["time"], shown["why"]) == ("Running", "1 min 30 s left", "")


def test_row_of_a_job_without_steps_has_dashes() -> None:
    shown = row(job("QUEUED"))

    assert (shown["share"], shown["steps"], shown["result"], shown["target_step"]) == (0.0, "not started", "—", "—")
    assert (shown["optimizer"], shown["lr"]) == ("own loop", "—")


def test_row_of_an_ended_job_has_no_time_left() -> None:
    assert row(job("SUCCEEDED", step=10, total=10))["time"] == "—"


def test_row_of_a_failed_job_says_why() -> None:
    failed = job("FAILED")
    status = failed.status.model_copy(update={"reason": "OutOfMemoryHost", "message": "rank 1 was killed"})

    assert row(failed.model_copy(update={"status": status}))["why"] == "OutOfMemoryHost: rank 1 was killed"


@pytest.mark.usefixtures("page")
def test_curve_marks_values_that_are_not_finite_on_the_step_axis() -> None:
    curves = Curves("Loss", curves={"loss": Curve("training")})

    script = curves.replace({"loss": [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]})

    assert "[0,[[1,2],[2,null],[3,null],[4,1]]],[0,[[2,0],[3,0]]]" in script
    assert "not finite" in curves.chart.options["legend"]["data"]


@pytest.mark.usefixtures("page")
def test_curve_grows_by_new_points_and_new_series() -> None:
    curves = Curves("Time", stacked=True)
    curves.replace({"data": [(1, 0.1)]})

    longer = curves.extend({"data": [(2, 0.2)]})
    wider = curves.extend({"data": [(3, 0.3)], "reduce": [(3, 0.5)]})
    without = curves.extend({"data": [(4, 0.4)]})

    assert longer.endswith(",[[1,[[2,0.2]]],[0,[]]]);")
    assert wider.endswith(",[[0,[[1,0.1],[2,0.2],[3,0.3]]],[0,[[1,0],[2,0],[3,0.5]]],[0,[]]]);")
    assert without.endswith(",[[3,[[4,0.4]]],[3,[[4,0]]],[0,[]]]);")


@pytest.mark.usefixtures("page")
def test_new_points_leave_the_chart_s_element_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = Curves("Loss", curves={"loss": Curve("training")})
    curves.replace({"loss": [(1, 1.0)]})
    updates: list[int] = []
    monkeypatch.setattr(curves.chart, "update", lambda: updates.append(1))

    curves.extend({"loss": [(2, 2.0)]})
    curves.cut(1)

    assert updates == []
    assert curves.points == {"loss": [(1, 1.0)]}


@pytest.mark.usefixtures("page")
def test_chart_without_points_says_so_beside_one_that_has_some() -> None:
    full, bare = Curves("Loss"), Curves("Rate")

    full.replace({"loss": [(1, 1.0)]})

    assert (full.note.text, bare.note.text) == ("loss 1 at step 1", "No data yet")


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize(
    ("values", "kind"),
    [((6e9, 4e8, 1e6), "log"), ((60.0, 10.0, 5.0), "value"), ((6e9, 0.0, 1.0), "value"), ((6e9, math.nan, 1.0), "log")],
)
def test_axis_is_logarithmic_where_a_linear_one_would_show_the_largest_value_alone(
    values: tuple[float, ...], kind: str
) -> None:
    curves = Curves("RMSE", curves={"rmse": Curve("training")}, may_be_log=True)

    curves.replace({"rmse": list(enumerate(values, start=1))})

    assert curves.chart.options["yAxis"][0]["type"] == kind
    assert curves.log_button is not None
    assert curves.log_button.text == {"log": "log", "value": "linear"}[kind]


@pytest.mark.usefixtures("page")
def test_axis_stays_as_the_reader_has_chosen_it() -> None:
    curves = Curves("RMSE", curves={"rmse": Curve("training")}, may_be_log=True)
    points = {"rmse": [(1, 6e9), (2, 1.0)]}
    curves.replace(points)
    assert curves.log_button is not None

    (listener,) = curves.log_button._event_listeners.values()
    handle_event(listener.handler, ClickEventArguments(sender=curves.log_button, client=curves.log_button.client))
    curves.replace(points)

    assert curves.chart.options["yAxis"][0]["type"] == "value"


@pytest.mark.usefixtures("page")
def test_legend_has_the_curves_that_are_drawn() -> None:
    curves = Curves("R2", curves={"r2": Curve("training"), "test_r2": Curve("test")})

    curves.replace({"test_r2": [(16, 0.97)]})
    alone = curves.chart.options["legend"] | {}
    curves.replace({"r2": [(1, 0.1)], "test_r2": [(16, math.inf)]})

    assert (alone["data"], alone["show"]) == (["test"], False)
    assert curves.chart.options["legend"]["data"] == ["training", "test", "not finite"]


def test_charts_without_data_are_left_out_once_others_have_some(page: Client) -> None:
    training, alone = laid_out(), Recorded()
    alone.groups = tuple(group for group in GROUPS if group != "bytes_sent")

    shown_before = [panel.title for panel in training.panels if panel.whole.visible]
    asyncio.run(training.refresh(alone, job("RUNNING", step=2)))

    assert "Sent per step, by kind" in shown_before
    left_out = [panel.title for panel in training.panels if not panel.whole.visible]
    assert left_out == ["Sent per step, by kind"]
    alone.groups = GROUPS
    asyncio.run(training.refresh(alone, job("RUNNING", step=2), whole=True))
    assert all(panel.whole.visible for panel in training.panels)


def test_stacked_parts_get_the_same_steps() -> None:
    points = aligned({"data": [(1, 0.1), (2, 0.1), (3, 0.1)], "capture": [(2, 0.5)]})

    assert points == {"data": [(1, 0.1), (2, 0.1), (3, 0.1)], "capture": [(1, 0.0), (2, 0.5), (3, 0.0)]}


class Recorded:
    """Answers with a curve of two steps for each name that is asked for, under which a group has one part."""

    groups = GROUPS

    async def metrics(self, job_id: str, *, names: Any, **_: Any) -> Metrics:
        alone = [name for name in names if name not in GROUPS]
        parts = [*alone, *(f"{name}.0" for name in names if name in self.groups)]
        return Metrics(series={part: Series(steps=[1, 2], values=[1.0, 0.5]) for part in parts}, last_step=2)


def test_learning_rate_and_damping_have_axes_of_their_own(page: Client) -> None:
    training = laid_out()

    asyncio.run(training.refresh(Recorded(), job("RUNNING", step=2)))

    assert training.lr.points == {"lr": [(1, 1.0), (2, 0.5)]}
    assert training.trust.points["damping"] == [(1, 1.0), (2, 0.5)]
    assert sum(len(panel.points) for panel in training.panels) == len(training.names)


def test_steps_that_are_done_again_are_taken_away_until_they_are(page: Client) -> None:
    training = laid_out()
    asyncio.run(training.refresh(Recorded(), job("RUNNING", step=2)))

    training.redo(1)

    assert training.of_metric["loss"].points == {"loss": [(1, 1.0)], "test_loss": [(1, 1.0)]}
    assert training.last_step == 1


@pytest.mark.usefixtures("page")
def test_table_of_a_chart_has_its_points_newest_first() -> None:
    curves = Curves("Loss", curves={"loss": Curve("training"), "test_loss": Curve("test")})
    curves.replace({"loss": [(1, 2.0), (2, math.nan)], "test_loss": [(2, 1.5)]})

    assert curves.columns() == [("key", "step"), ("loss", "training"), ("test_loss", "test")]
    assert curves.rows() == [{"key": 2, "loss": "not finite", "test_loss": "1.5"}, {"key": 1, "loss": "2"}]


@pytest.mark.usefixtures("page")
def test_axis_in_bytes_has_ticks_at_powers_of_two() -> None:
    curves = Curves("Sent", unit=BYTES, stacked=True)

    curves.replace({"gradients": [(1, 400_000)], "statistics": [(1, 300_000)]})

    assert curves.chart.options["yAxis"][0]["interval"] == 2**18
    assert curves.chart.options["yAxis"][0]["max"] == 3 * 2**18


@pytest.mark.usefixtures("page")
def test_chart_says_in_words_what_it_shows() -> None:
    curves = Curves("Loss", curves={"loss": Curve("training")})

    curves.replace({"loss": [(step, 1 / step) for step in range(1, 41)]})

    assert curves.note.text == "training 0.025 at step 40, falling"
    assert (curves.figure.props["aria-label"], curves.figure.props["aria-describedby"]) == ("Loss", curves.note.html_id)


def ages(num_steps: int, span: int, first: int = 1) -> Statistics:
    """Two statistics that are measured every step, and every third."""
    ends = [min(end, num_steps) for end in range(first + span - 1, num_steps + span, span)]
    return Statistics(
        names=["conv.A", "conv.G"],
        steps=ends,
        ages=[[0] * len(ends), [(end - 1) % 3 for end in ends]],
        intervals=[[1] * len(ends), [3] * len(ends)],
        refreshes=[[span] * len(ends), [span // 3] * len(ends)],
        span=span,
        last_step=num_steps,
    )


class Growing:
    """Answers with the statistics of a job that goes on, and remembers what it was asked."""

    def __init__(self) -> None:
        self.num_steps = 100
        self.asked: list[tuple[int, int]] = []

    async def statistics(
        self,
        job_id: str,
        *,
        max_points: int,
        from_step: int = 1,
        to_step: int | None = None,
        span: int = 1,
        judged: bool = False,
    ) -> Statistics:
        last = min(self.num_steps, to_step or self.num_steps)
        while -(-(last + 1 - from_step) // span) > max_points:
            span *= 2
        self.asked.append((from_step, span))
        return ages(last, span, (from_step - 1) // span * span + 1)


@pytest.mark.usefixtures("page")
def test_heat_map_asks_for_complete_new_columns_alone(sent: list[str]) -> None:
    heat_map, api = HeatMap(View()), Growing()
    heat_map.num_rows = 2

    def goes_on(to: int) -> None:
        api.num_steps = to
        asyncio.run(heat_map.refresh(api, "job_1", to, whole=False))

    goes_on(300)
    goes_on(301)
    goes_on(303)

    assert api.asked == [(1, 2), (301, 2)]  # at step 301 no column of two steps is complete
    assert heat_map.statistics is not None
    assert heat_map.statistics.steps == list(range(2, 303, 2))
    assert sent[1].endswith(',150,[["302",[0,1],[1,3],[2,0]]],0)')
    assert heat_map.rows()[0]["refreshes"] == 302

    goes_on(400)

    assert api.asked[2:] == [(303, 2), (1, 4)]  # there is no more room: half as many columns
    assert heat_map.statistics.steps == list(range(4, 401, 4))


@pytest.mark.usefixtures("page")
def test_heat_map_has_finer_columns_of_the_steps_in_view_until_the_view_moves(sent: list[str]) -> None:
    heat_map, api = HeatMap(View(window=(100, 149))), Growing()
    heat_map.num_rows = 2

    def goes_on(to: int) -> list[str]:
        api.num_steps, before = to, len(sent)
        asyncio.run(heat_map.refresh(api, "job_1", to, whole=False))
        return sent[before:]

    goes_on(1_000)

    assert api.asked == [(1, 8), (100, 1)]
    assert heat_map.fine is not None
    assert heat_map.fine.steps == list(range(100, 150))
    assert '["100",' in sent[-1]
    assert goes_on(1_016) == []  # two columns of all steps, which are out of view
    assert heat_map.statistics is not None
    assert heat_map.statistics.steps[-1] == 1_016
    heat_map.view.window = (1_010, 1_100)
    asyncio.run(heat_map.refine(api, "job_1"))
    assert '["1,016",' in goes_on(1_017)[-1]  # in view, and finer than those that are complete
    heat_map.view.follows = True
    assert '["8",' in goes_on(1_018)[-1]
    assert heat_map.fine is None


def test_heat_map_takes_columns_away_whose_steps_are_done_again(page: Client) -> None:
    heat_map, api = HeatMap(View()), Growing()
    heat_map.num_rows, api.num_steps = 2, 300
    asyncio.run(heat_map.refresh(api, "job_1", 300, whole=False))

    heat_map.cut(51)

    assert heat_map.statistics is not None
    assert (heat_map.statistics.steps[-1], heat_map.complete_until) == (50, 50)


@pytest.mark.usefixtures("page")
def test_heat_map_tells_refreshes_and_intervals() -> None:
    heat_map = HeatMap(View())
    known = Statistics(
        names=["conv.A", "conv.G"],
        steps=[1, 2, 3],
        ages=[[0, 0, 0], [0, 1, 0]],
        intervals=[[1, 1, 1], [2, 2, 3]],
        refreshes=[[1, 1, 1], [1, 0, 1]],
        last_step=3,
    )

    heat_map.replace(known)

    assert heat_map.note.text == "5 of 6 possible refreshes done (83.3%) by step 3; longest interval then 3 steps"
    assert heat_map.rows()[1] == {"key": "conv.G", "age": 0, "interval": 3, "refreshes": 2, "mean": "1.5"}


@pytest.mark.parametrize("rows", [1, 13, 108, 1_000])
def test_heat_map_has_no_more_cells_than_a_browser_redraws_in_a_second(rows: int) -> None:
    columns = columns_for(rows)

    assert columns == 20 or columns * rows <= MAX_CELLS
    assert rows / span_for(rows) <= CELLS_PER_STEP


@pytest.mark.usefixtures("page")
def test_list_of_events_is_bounded_and_dated() -> None:
    events = EventPanel()

    for batch in range(3):
        events.add([event("checkpoint", step=batch * 100 + i, bytes=1, path="c") for i in range(100)])

    assert len(events.list.default_slot.children) == MOST_EVENTS + 1  # and the hint, which is hidden
    newest = events.list.default_slot.children[0].props["innerHTML"]
    assert 'datetime="2030-01-02T12:00:00+00:00">2030-01-02 12:00:00 UTC</reader-time>' in newest
    assert "Checkpoint of step 299 saved (1 B)" in newest


@pytest.mark.usefixtures("page")
def test_words_of_an_event_are_no_html() -> None:
    events = EventPanel()

    events.add([event("failed", reason="R", message="<img src=x>", retryable=False)])

    assert "R: &lt;img src=x&gt;" in events.list.default_slot.children[0].props["innerHTML"]


def test_page_in_whose_place_an_error_was_raised_says_so(page: Client) -> None:
    _failed()

    shown = [element.text for element in page.elements.values() if isinstance(element, ui.label)]
    assert "This page can't be shown" in shown
    assert "Live" not in shown

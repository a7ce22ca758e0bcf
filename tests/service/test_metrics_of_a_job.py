"""The service speaks in a job's own metrics: a language model's, those of a loop of the user's own, an older version's.

Each job is stored as its worker would tell of it, read through the API, and shown as the dashboard and `ngd` do.
"""

import asyncio
import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from nicegui import Client as PageClient
from rich.console import Console

from deploy import demo
from ngd_service.api.serializers import event_resource, job_resource
from ngd_service.api.series import curves
from ngd_service.cli import follow as following
from ngd_service.cli.listing import job_table
from ngd_service.dashboard.activity import words
from ngd_service.dashboard.jobs import row
from ngd_service.dashboard.summary import Summary, facts_of, recipe, steps
from ngd_service.job_state import Decision, Phase
from ngd_service.resources import Job, Metrics, Result, Series
from ngd_service.store import tables as t
from ngd_service.store.base import Claim, Store
from ngd_service.store.spans import GROUPS, Wanted
from ngd_service.store.sql import SQLStore
from ngd_workers.contract.events import (
    Done,
    Evaluation,
    Event,
    Metric,
    Started,
    StepRecord,
    Steps,
    TargetReached,
)
from ngd_workers.contract.rundir import Outcome
from tests.support.history import numbered, start_job
from tests.support.laid_out import laid_out

NOW = datetime(2030, 1, 2, tzinfo=UTC)
EVERYTHING = Wanted(most_steps=1000, most_spans=100)
LOSS = Metric(name="loss", label="loss", better="lower")
PERPLEXITY = Metric(name="perplexity", label="perplexity", better="lower")
BLEU = Metric(name="bleu", label="BLEU", better="higher")


def started(*metrics: Metric, total_steps: int | None = 4) -> Started:
    return Started(
        spec={}, seed=0, commit=None, versions={}, world_size=2, device="cpu", total_steps=total_steps,
        metrics=list(metrics), steps_per_epoch=None, parameters=None, resumed_step=0, statistics=[],
        plain_parameters={},
    )  # fmt: skip


def record(step: int, metrics: dict[str, float], **more: Any) -> StepRecord:
    return StepRecord(step=step, time_s=NOW.timestamp() + step, metrics=metrics, **more)


def tell(store: Store, claim: Claim, *events: Event, first_seq: int = 1) -> None:
    delivered = [numbered(seq, event) for seq, event in enumerate(events, start=first_seq)]
    store.ingest(f"{claim.job.id}-a1", delivered)


def change(store: SQLStore, claim: Claim, **columns: Any) -> None:
    """Stores a job's columns as another version would."""
    with store._writers.begin() as connection:
        connection.execute(sa.update(t.jobs).where(t.jobs.c.id == claim.job.id).values(columns))


def read(store: Store, claim: Claim) -> Job:
    """The job as a client gets it."""
    stored = store.get_job(claim.job.id)
    assert stored is not None
    return Job.model_validate_json(job_resource(stored).model_dump_json())


def series(store: Store, claim: Claim) -> dict[str, Series]:
    trained, tested = (store.spans(claim.job.id, kind, EVERYTHING) for kind in ("curves", "evaluations"))
    return curves(trained, set()) | curves(tested, set())


def told(store: Store, claim: Claim) -> list[str]:
    events = [event_resource(event) for event in store.events_after(claim.job.id, 0, 100)]
    return [words(event, read(store, claim).metrics) for event in events if event.kind not in ("phase", "steps")]


def listed(job: Job) -> dict[str, str]:
    """The job's line of `ngd jobs`, by column."""
    table = job_table([job], Console(file=io.StringIO(), width=300))
    return {str(column.header): next(iter(column._cells)) for column in table.columns}  # type: ignore[misc]


@pytest.fixture
def language_model(store: SQLStore) -> Claim:
    """A job on two metrics of which lower is better, with a target, that has been tested once."""
    claim = start_job(store)
    change(store, claim, spec=claim.job.spec | {"target": {"metric": "perplexity", "value": 5.5, "stop": False}})
    records = [
        record(step, {"loss": 2 / step, "perplexity": 8 / step}, lr=0.1, seconds={"data": 0.25, "update": 0.75})
        for step in (1, 2, 3, 4)
    ]
    tested = {"loss": 1.65, "perplexity": 5.312}
    tell(
        store,
        claim,
        started(LOSS, PERPLEXITY),
        Steps(records=records),
        Evaluation(step=4, metrics=tested),
        TargetReached(step=4, metrics={"perplexity": 5.312}),
        Done(step=4, metrics=tested, target_step=4, seconds=2.0),
    )
    return claim


@pytest.fixture
def own_loop(store: SQLStore) -> Claim:
    """A job of a loop of the user's own: it has no model, no loss, no end that is known, and reports one number."""
    claim = start_job(store)
    common = {name: claim.job.spec[name] for name in ("name", "resources", "checkpoint", "failure", "target", "seed")}
    change(store, claim, spec=common | {"train": {"function": "mine:train", "options": {}}})
    tell(store, claim, started(total_steps=None), Steps(records=[record(s, {"mean_reward": s * 1.5}) for s in (1, 2)]))
    return claim


@pytest.fixture
def older(store: SQLStore) -> Claim:
    """A job that version 0.1 stored: each metric a field of its own, everywhere."""
    claim = start_job(store)
    change(
        store,
        claim,
        spec=claim.job.spec | {"target": {"test_accuracy": 0.97, "stop": True}},
        progress={"step": 2, "total_steps": 2, "epoch": 1.0},
        metrics_latest={"loss": 0.5, "accuracy": 0.75, "lr": 0.1, "samples_per_s": 10.0, "test_loss": 0.25,
                        "test_accuracy": 0.98},
        result=json.dumps({"result": "succeeded", "step": 2, "test_accuracy": 0.98, "test_loss": 0.25,
                           "target_step": 2, "seconds": 1.0}),
    )  # fmt: skip
    where = {"job_id": claim.job.id, "attempt": 1}
    step = {"epoch": 0.5, "time_s": 1.0, "accuracy": 0.75, "lr": 0.1, "samples_per_s": 10.0, "seconds": {"data": 0.1},
            "bytes_sent": {}, "ages": [], "intervals": [], "failed_inversions": 0}  # fmt: skip
    tested = {"epoch": 1.0, "test_loss": 0.25, "test_accuracy": 0.98}
    with store._writers.begin() as connection:
        for number, loss in ((1, "NaN"), (2, 0.5)):
            content = json.dumps(step | {"step": number, "loss": loss})
            connection.execute(sa.insert(t.steps).values(where | {"step": number, "seq": number, "json": content}))
        content = json.dumps({"kind": "evaluation", "step": 2} | tested)
        connection.execute(sa.insert(t.evaluations).values(where | {"step": 2, "seq": 3, "json": content}))
        happened = {
            "evaluation": {"step": 2} | tested,
            "target_reached": {"step": 2, "test_accuracy": 0.98},
            "done": {"step": 2, "target_step": 2, "seconds": 1.0, "test_loss": 0.25, "test_accuracy": 0.98},
        }
        for kind, data in happened.items():
            connection.execute(sa.insert(t.events).values(where | {"kind": kind, "time": NOW, "data": data}))
    return claim


def test_newest_values_and_curves_have_the_names_of_the_metrics(store: SQLStore, language_model: Claim) -> None:
    job, known = read(store, language_model), series(store, language_model)

    assert job.metrics_latest == {
        "lr": 0.1, "loss": 0.5, "perplexity": 2.0, "test_loss": 1.65, "test_perplexity": 5.312,
    }  # fmt: skip
    assert known["perplexity"].values == [8.0, 4.0, 8 / 3, 2.0]
    assert (known["test_perplexity"].steps, known["test_perplexity"].values) == ([4], [5.312])
    assert known["skipped_samples"].values == [0.0] * 4
    assert {"samples_per_s", "accuracy", "epoch"}.isdisjoint(known)


def test_metric_of_the_target_comes_first(store: SQLStore, language_model: Claim) -> None:
    metrics = read(store, language_model).metrics

    assert [(m.name, m.label, m.better, m.unit) for m in metrics] == [
        ("perplexity", "perplexity", "lower", "number"),
        ("loss", "loss", "lower", "number"),
    ]


def test_dashboard_speaks_in_perplexity(store: SQLStore, language_model: Claim) -> None:
    outcome = Outcome(result="succeeded", step=4, metrics={"loss": 1.65, "perplexity": 5.312}, target_step=4)
    store.apply(language_model, Decision(Phase.SUCCEEDED, ends_attempt=True), NOW, outcome)
    job = read(store, language_model)

    assert row(job)["result"] == "perplexity 5.312"
    assert facts_of(job) == [
        ("Test perplexity", "5.312", "training 2, target at most 5.5, reached at step 4"),
        ("Test loss", "1.65", "training 0.5"),
    ]
    assert told(store, language_model)[-3:] == [
        "Tested at step 4: perplexity 5.312, loss 1.65",
        "Target reached at step 4: test perplexity 5.312",
        "Done at step 4: test perplexity 5.312, loss 1.65",
    ]
    assert job.status.result is not None
    assert job.status.result.metrics == {"loss": 1.65, "perplexity": 5.312}


def unreached(job: Job) -> Result:
    assert job.status.result is not None
    return job.status.result.model_copy(update={"target_step": None})


def test_command_line_and_demo_speak_in_perplexity(store: SQLStore, language_model: Claim) -> None:
    running = read(store, language_model)
    assert following._metrics(running) == "perplexity 2 (test 5.312)  loss 0.5 (test 1.65)  0:00 left"
    outcome = Outcome(result="succeeded", step=4, metrics={"loss": 1.65, "perplexity": 5.312}, target_step=4, seconds=2)
    store.apply(language_model, Decision(Phase.SUCCEEDED, ends_attempt=True), NOW, outcome)
    ended = read(store, language_model)

    assert (listed(ended)["loss"], listed(ended)["result"]) == ("0.5", "perplexity 5.312")
    assert following._ending(ended) == (
        "+ long SUCCEEDED at step 4, test perplexity 5.312, loss 1.65, perplexity at most 5.5 reached at step 4"
    )
    missed = ended.model_copy(update={"status": ended.status.model_copy(update={"result": unreached(ended)})})
    assert following._ending(missed).endswith(", perplexity at most 5.5 not reached")
    table = demo._table({"SP-NGD": ended})
    assert [column.header for column in table.columns] == [
        "optimizer", "test perplexity", "steps", "steps to perplexity at most 5.5", "seconds of training",
    ]  # fmt: skip
    assert [next(iter(column._cells)) for column in table.columns] == ["SP-NGD", "5.312", "4", "4", "2.0"]


def test_target_that_is_not_reached_says_in_which_direction_it_lies(store: SQLStore) -> None:
    claim = start_job(store)
    change(store, claim, spec=claim.job.spec | {"target": {"metric": "bleu", "value": 33.0, "stop": False}})
    tell(store, claim, started(LOSS, BLEU), Steps(records=[record(1, {"loss": 2.0})]))

    assert facts_of(read(store, claim)) == [
        ("BLEU", "—", "target at least 33"),
        ("Training loss", "2", ""),
    ]
    tell(store, claim, Evaluation(step=1, metrics={"bleu": 12.5, "loss": 3.0}), first_seq=3)
    assert facts_of(read(store, claim))[0] == ("Test BLEU", "12.5", "target at least 33")
    assert following._newest(read(store, claim).metrics[0], read(store, claim).metrics_latest) == "test BLEU 12.5"


def test_share_of_a_step_spent_waiting_for_data_is_told(store: SQLStore, language_model: Claim) -> None:
    assert read(store, language_model).status.progress.data_share == pytest.approx(0.25)

    tell(store, language_model, Steps(records=[record(5, {}, seconds={"data": 0.5, "update": 0.5})]), first_seq=6)
    moved = read(store, language_model).status.progress.data_share
    assert moved == pytest.approx(0.8 * 0.25 + 0.2 * 0.5)

    tell(store, language_model, Steps(records=[record(6, {}, seconds={"update": 0.5})]), first_seq=7)
    assert read(store, language_model).status.progress.data_share == moved


def test_metrics_that_are_not_finite_travel_in_events_too(store: SQLStore) -> None:
    """PostgreSQL's JSON has no NaN, however deep."""
    claim = start_job(store)
    tell(store, claim, started(LOSS), Evaluation(step=1, metrics={"loss": float("nan")}))

    assert told(store, claim)[-1] == "Tested at step 1: loss not a number"
    assert str(read(store, claim).metrics_latest["test_loss"]) == "nan"


def test_metrics_outlive_a_restart_of_the_workers(store: SQLStore, language_model: Claim) -> None:
    tell(store, language_model, started(), first_seq=6)

    assert [metric.name for metric in read(store, language_model).metrics] == ["perplexity", "loss"]


def test_loop_of_one_s_own_shows_the_numbers_that_it_reports(store: SQLStore, own_loop: Claim) -> None:
    job, known = read(store, own_loop), series(store, own_loop)

    assert [(metric.name, metric.label, metric.better) for metric in job.metrics] == [
        ("mean_reward", "mean reward", None)
    ]
    assert job.metrics_latest == {"mean_reward": 3.0}
    assert (known["mean_reward"].values, "loss" in known) == ([1.5, 3.0], False)
    assert row(job)["result"] == "mean reward 3 in training"
    assert (row(job)["steps"], row(job)["share"]) == ("2", 0.0)
    assert (listed(job)["loss"], listed(job)["step"]) == ("-", "2")
    assert following._metrics(job) == "mean reward 3"
    assert recipe(job).startswith("mine:train · 1 worker · submitted")
    assert (steps(job), job.status.progress.data_share) == ("2", None)


def test_job_without_news_has_no_metric_yet(store: SQLStore) -> None:
    job = read(store, start_job(store))

    assert (job.metrics, facts_of(job), row(job)["result"], listed(job)["result"]) == ([], [], "—", "-")


def test_job_of_an_older_version_is_still_shown(store: SQLStore, older: Claim) -> None:
    job, known = read(store, older), series(store, older)

    assert known["accuracy"].values == [0.75, 0.75]
    assert (known["loss"].steps, str(known["loss"].values[0]), known["loss"].values[1]) == ([1, 2], "nan", 0.5)
    assert (known["test_accuracy"].values, known["test_loss"].values) == ([0.98], [0.25])
    assert job.status.result is not None
    assert job.status.result.metrics == {"accuracy": 0.98, "loss": 0.25}
    assert job.spec["target"] == {"metric": "accuracy", "value": 0.97, "stop": True}
    assert [metric.name for metric in job.metrics] == ["accuracy", "loss"]
    assert row(job)["result"] == "accuracy 0.98"
    assert told(store, older) == [
        "Tested at step 2: accuracy 0.98, loss 0.25",
        "Target reached at step 2: test accuracy 0.98",
        "Done at step 2: test accuracy 0.98, loss 0.25",
    ]


def test_steps_of_both_versions_make_one_curve(store: SQLStore, older: Claim) -> None:
    tell(store, older, Steps(records=[record(3, {"loss": 0.25, "accuracy": 1.0})]))

    assert series(store, older)["accuracy"].steps == [1, 2, 3]
    thinned = store.spans(older.job.id, "curves", Wanted(most_steps=1, most_spans=1))
    assert thinned.spans[0].content["accuracy"] == [[1, 0.75], [3, 1.0], None]


class Recorded:
    """Answers with a curve of one step for each name, but for groups."""

    async def metrics(self, job_id: str, *, names: list[str], **_: Any) -> Metrics:
        alone = [name for name in names if name not in GROUPS]
        return Metrics(series={name: Series(steps=[1], values=[0.5]) for name in alone}, last_step=1)


def test_each_metric_has_a_chart_in_its_unit(
    store: SQLStore, language_model: Claim, page: PageClient, sent: list[str]
) -> None:
    training, job = laid_out(), read(store, language_model)
    share = Metric(name="top5", label="top-5 \" onclick='x", better="higher", unit="share")
    more = job.model_copy(update={"metrics": [*job.metrics, share]})

    asyncio.run(training.refresh(Recorded(), job))
    asyncio.run(training.refresh(Recorded(), more))

    assert [panel.title for panel in training.panels[:4]] == ["Loss", "Perplexity", "Top-5 \" onclick='x", "Throughput"]
    perplexity, top5 = training.of_metric["perplexity"], training.of_metric["top5"]
    assert perplexity.points == {"perplexity": [(1, 0.5)], "test_perplexity": [(1, 0.5)]}
    assert (perplexity.chart.options["yAxis"][0]["name"], top5.chart.options["yAxis"][0]["name"]) == ("perplexity", "%")
    assert (top5.rows()[0]["top5"], top5.note.text) == ("50.00%", "training 50.00% at step 1; test 50.00% at step 1")
    assert (top5.figure.props["aria-label"], "onclick" in top5.figure.props) == ("Top-5 \" onclick='x", False)
    (line,) = perplexity.chart.options["series"][0]["markLine"]["data"]
    assert (line["yAxis"], line["label"]["formatter"], line["label"]["position"]) == (5.5, "target 5.5", "insideEndTop")
    assert "markLine" not in training.of_metric["loss"].chart.options["series"][0]
    ids = [panel.chart.id for panel in training.panels]
    assert sent[-1].endswith(f"ngd.connect({json.dumps(ids)},null)")


def test_job_without_a_loss_has_no_chart_of_it(store: SQLStore, own_loop: Claim, page: PageClient) -> None:
    training = laid_out()

    asyncio.run(training.refresh(Recorded(), read(store, own_loop)))

    assert [panel.title for panel in training.panels[:2]] == ["Mean reward", "Throughput"]


def test_skipped_samples_are_told_where_a_reader_looks(store: SQLStore, own_loop: Claim, page: PageClient) -> None:
    async def cancel() -> None: ...

    summary = Summary(cancel, "job_1")
    summary.show(read(store, own_loop))
    assert not summary.hole.visible

    tell(store, own_loop, Steps(records=[record(3, {"mean_reward": 1.0}, skipped_samples=3)]), first_seq=3)
    job = read(store, own_loop)
    summary.show(job)

    assert summary.hole.visible
    assert summary.skipped.text.startswith("3 samples could not be read and were left out")
    assert following._metrics(job) == "mean reward 1  3 samples skipped"
    assert [fact.name.text for fact in summary.scores] == ["Training mean reward"]

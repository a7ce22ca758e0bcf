"""What the record of a step says of the statistics that were due."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.telemetry import LayerStats, Refresh, Spectrum, StepStats
from ngd_service.api.internal import MAX_BATCH_BYTES
from ngd_workers.contract.events import Layers, Numbered, StepRecord, Steps
from ngd_workers.train import records
from ngd_workers.train.records import judged, layers_of, step_record


def refresh(
    statistic: str,
    *,
    change: float = math.inf,
    error: float = math.inf,
    ending: str = "OK",
    method: str | None = None,
    residual: float = math.inf,
) -> Refresh:
    return Refresh(
        statistic,
        change=change,
        change_to_before=math.inf,
        noise=0.123456,
        threshold=0.2,
        error=error,
        residual=residual,
        method=method,
        ending=ending,
        age=1,
        interval=1,
        seconds=0.5,
        inversion_seconds=0.0123456,
        bytes_sent=0,
    )


def having(*refreshes: Refresh) -> NGD:
    """An optimizer of the statistics 0.A, 0.G, 1.A and 1.G, of which these were due."""
    optimizer = NGD(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    optimizer.stats = StepStats(refreshes=[*refreshes])
    return optimizer


def test_statistics_that_were_measured_are_told_by_their_places() -> None:
    told = judged(having(refresh("1.A", change=0.5), refresh("0.A", change=0.25, ending="INACCURATE")))

    assert told is not None
    assert (told.statistics, told.changes, told.noises, told.errors) == ([2, 0], [0.5, 0.25], [0.1235] * 2, [None] * 2)
    assert told.failed == {0: "INACCURATE"}


def test_inversions_are_told_by_method_with_short_numbers() -> None:
    told = judged(
        having(
            refresh("0.A", method="CHOLESKY", residual=1.23456e-7),
            refresh("0.G", ending="NON_FINITE"),
            refresh("1.A", method="EIGENDECOMPOSITION"),
            refresh("1.G", method="CHOLESKY", residual=math.nan, ending="INACCURATE"),
        )
    )

    assert told is not None
    assert told.methods == {"CHOLESKY": [0, 3], "EIGENDECOMPOSITION": [2]}
    assert told.residuals == [1.2e-7, None, None, None]
    assert told.inversion_seconds == [0.0123, None, 0.0123, 0.0123]
    assert told.failed == {1: "NON_FINITE", 3: "INACCURATE"}


def test_steps_of_the_most_statistics_fit_into_one_batch() -> None:
    """64 steps of 10,000 statistics, as many of them judged and inverted as are told."""
    optimizer = NGD(nn.Sequential(*(nn.Linear(1, 1) for _ in range(records.MOST_JUDGED))))
    one = refresh("", change=0.123456, method="WARM_NEWTON_SCHULZ", residual=1.23456e-7)
    optimizer.stats = StepStats(refreshes=[replace(one, statistic=name) for name in optimizer.statistic_names])

    told = judged(optimizer)

    assert told is not None
    assert len(told.statistics) == records.MOST_JUDGED
    ages = len("100,") * 2 * 10_000
    assert 64 * (len(told.model_dump_json()) + ages) < MAX_BATCH_BYTES


def test_step_of_very_many_statistics_still_fits_into_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MOST_JUDGED", 1)

    told = judged(having(refresh("1.A", change=0.5), refresh("0.A", change=0.25, ending="INACCURATE")))

    assert told is not None
    assert (told.statistics, told.changes, told.failed) == ([2], [0.5], {})


@pytest.mark.parametrize(
    ("refreshes", "is_told"),
    [
        ([], False),
        ([refresh("0.A")], False),  # the first value, or a fixed interval
        ([refresh("0.A", error=0.1)], True),
        ([refresh("0.A", method="CHOLESKY")], True),
        ([refresh("0.A", ending="NON_FINITE")], True),
    ],
)
def test_nothing_is_told_of_statistics_of_which_nothing_was_measured(refreshes: list[Refresh], is_told: bool) -> None:
    assert (judged(having(*refreshes)) is not None) == is_told


def test_record_of_a_step_tells_the_changes_of_its_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = NGD(model, NGDConfig(lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(4, (32,))).backward()
        optimizer.step()

    record = step_record(
        optimizer, step=2, epoch=0.5, metrics={"loss": 1.0}, samples_per_s=1.0, seconds={"forward_backward": 1.0},
        bytes_sent={}, skipped_samples=0,
    )  # fmt: skip

    assert record.judged is not None
    assert record.judged.statistics == [0, 1]
    assert record.judged.changes == [pytest.approx(one.change, rel=1e-3) for one in optimizer.stats.refreshes]
    assert record.judged.methods == {"CHOLESKY": [0, 1]}
    assert all(0 <= residual < 1e-3 for residual in record.judged.residuals if residual is not None)
    assert all(
        0 < inverting <= one.seconds * 1.01
        for inverting, one in zip(record.judged.inversion_seconds, optimizer.stats.refreshes, strict=True)
        if inverting is not None
    )
    assert optimizer.owners == [0, 0]
    assert StepRecord.model_validate_json(record.model_dump_json()) == record


def test_record_of_a_version_without_them_is_read() -> None:
    assert StepRecord.model_validate({"step": 1, "time_s": 0.0, "metrics": {"loss": 1.0}}).judged is None


def test_layers_that_were_watched_are_told_with_their_spectra() -> None:
    optimizer = having()
    spectra = {"1.A": Spectrum((0.0, 0.25, 0.5, 1.0, 4.123456), damping=math.nan, is_estimate=True)}
    layers = LayerStats(7, [1.23456, 2.0], [0.1, 0.2], [math.nan, 0.51234], 0.012345, None, spectra)
    optimizer.stats = StepStats(layers=layers)

    told = layers_of(optimizer)

    assert told is not None
    assert (told.step, told.gradient_norms, told.cosines) == (7, [1.235, 2.0], [None, 0.5123])
    assert told.spectra == {2: [0.0, 0.25, 0.5, 1.0, 4.123, None, None]}
    assert told.estimated == [2]
    assert Layers.model_validate_json(told.model_dump_json()) == told


def test_field_of_a_later_version_is_passed_over() -> None:
    given = {"step": 1, "time_s": 0.0, "metrics": {"loss": 1.0}, "seconds": {"data": 1.0}, "of_tomorrow": [1, 2]}
    numbered = Numbered.model_validate({"seq": 1, "time_s": 0.0, "event": {"kind": "steps", "records": [given]}})

    assert isinstance(numbered.event, Steps)
    assert numbered.event.records[0].metrics == {"loss": 1.0}
    assert not hasattr(numbered.event.records[0], "of_tomorrow")

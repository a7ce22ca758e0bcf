"""What is told now and then of layers, factors and ranks: kept, read and shown."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from nicegui import Client

from ngd_service.api.series import anatomy, curves
from ngd_service.dashboard.cumulative import ALL_REFRESHED, SENT, SGD, Cumulative
from ngd_service.dashboard.layers import LayersPanel, SpectraPanel
from ngd_service.dashboard.ranks import NO_PSUTIL, PhasesByRank, Workers, straggler
from ngd_service.dashboard.trust import Trust
from ngd_service.dashboard.view import View
from ngd_service.resources import Anatomy, RankAnatomy
from ngd_service.store.spans import KINDS, Name, Span, Spans, fold
from ngd_workers.contract.events import Layers, Ranks, StepRecord

STARTED = {"layers": ["0", "2"], "statistics": ["0.A", "0.G", "2.A", "2.G"], "hosts": ["a", "b"], "device": "cpu"}


def layers(step: int, spectra: dict[int, list[float | None]] | None = None, **changes: Any) -> Layers:
    told = {"gradient_norms": [3.0, 4.0], "update_norms": [0.3, 0.4], "cosines": [0.9, 0.5 / step], "kl": 0.01 * step}
    return Layers(step=step, clip_factor=None, spectra=spectra or {}, **told | changes)


def ranks(cpu: float | None = 1.5, **changes: Any) -> Ranks:
    told: dict[str, Any] = {
        "steps": 10,
        "seconds": {"data": [0.1, 0.1], "forward_backward": [1.0, 1.0], "reduce": [0.9, 0.1]},
        "cpu": [cpu, cpu],
        "memory_bytes": [2.0**30, 2.0**31],
        "gpu": [None, None],
        "gpu_memory_bytes": [None, None],
        "sent_bytes_per_s": [2048.0, 0.0],
        "received_bytes_per_s": [0.0, 2048.0],
    }
    return Ranks.model_validate(told | changes)


def records() -> list[StepRecord]:
    """Twenty steps: layers are told in three of them, ranks in two."""
    told: dict[int, dict[str, Any]] = {
        2: {"layers": layers(1, {0: [0.0, 0.1, 0.2, 0.3, 0.4, 0.05, 9.0], 1: [0.0, 0.0, 0.0, 0.0, 1.0, None, None]})},
        9: {"layers": layers(8, {0: [0.1, 0.1, 0.2, 0.3, 0.5, 0.05, 4.0]}, estimated=[0]), "ranks": ranks(1.0)},
        17: {"layers": layers(16)},
        18: {"ranks": ranks(2.0)},
    }
    return [
        StepRecord(step=step, time_s=step, metrics={"loss": 1.0}, bytes_so_far=100 * step, **told.get(step, {}))
        for step in range(1, 21)
    ]


def spans(name: Name, of: Sequence[StepRecord], level: int) -> Spans:
    """What a store keeps of these steps, through JSON and through every level on the way."""
    kind = KINDS[name]
    folded = [Span(record.step, kind.of_record(json.loads(record.model_dump_json()))) for record in of]
    for step in range(level):
        folded = fold(kind, folded, step + 1)
    return Spans(1 << level, len(of), folded)


@pytest.mark.parametrize("level", [0, 1, 3, 5])
def test_newest_of_each_thing_is_kept_however_wide_the_spans(level: int) -> None:
    told = anatomy(STARTED, spans("newest", records(), level))

    assert told.layers is not None
    assert (told.layers.step, told.layers.names, told.layers.cosines) == (16, ["0", "2"], [0.9, 0.5 / 16])
    assert [(one.name, one.step) for one in told.spectra] == [("0.A", 8), ("0.G", 1)]
    assert (told.spectra[0].quantiles, told.spectra[0].damping) == ([0.1, 0.1, 0.2, 0.3, 0.5], 0.05)
    assert told.spectra[1].condition is None
    assert [one.is_estimate for one in told.spectra] == [True, False]
    assert told.ranks is not None
    assert (told.ranks.step, told.ranks.cpu, told.ranks.hosts) == (18, [2.0, 2.0], ["a", "b"])
    assert told.last_step == 20


def test_what_was_told_before_another_number_of_ranks_or_layers_is_left_out() -> None:
    told = anatomy(STARTED | {"hosts": ["a"], "layers": ["0", "2", "4"]}, spans("newest", records(), 0))

    assert (told.layers, told.ranks) == (None, None)


def test_job_of_an_earlier_version_tells_nothing() -> None:
    told = anatomy({"statistics": ["0.A"], "device": "cpu"}, spans("newest", records()[:1], 0))

    assert (told.layers, told.spectra, told.ranks) == (None, [], None)


def test_curves_of_layers_stand_at_the_steps_that_were_measured() -> None:
    known = curves(spans("curves", records(), 0), set())

    assert (known["layers.kl"].steps, known["layers.kl"].values) == ([1, 8, 16], pytest.approx([0.01, 0.08, 0.16]))
    assert known["layers.gradient_norm"].values == [5.0] * 3
    assert known["layers.lowest_cosine"].values == pytest.approx([0.5, 0.0625, 0.03125])
    assert "layers.clip_factor" not in known
    assert known["ranks.cpu.1"].values == [1.0, 2.0]
    assert "ranks.gpu.0" not in known
    assert known["bytes_so_far"].values[-1] == 2000


def rank_anatomy(**changes: Any) -> RankAnatomy:
    return RankAnatomy(step=18, hosts=["a", "b"], device=changes.pop("device", "cpu"), **ranks(**changes).model_dump())


def test_rank_that_works_longer_is_named_with_its_phase() -> None:
    told = rank_anatomy(seconds={"data": [0.1, 2.1], "forward_backward": [1.0, 1.1], "reduce": [2.1, 0.0]})

    assert straggler(told) == "rank 1 is a straggler: it works 1.488 times the median, most of it in data"


def test_ranks_that_only_wait_are_no_stragglers() -> None:
    assert straggler(rank_anatomy()).startswith("no straggler")


def shown(**parts: Any) -> Anatomy:
    return Anatomy(**{"layers": None, "spectra": [], "ranks": None, "last_step": 20} | parts)


@pytest.mark.usefixtures("page")
def test_workers_say_when_there_is_no_gpu_and_no_psutil() -> None:
    panel, by_rank = Workers(), PhasesByRank()
    told = shown(ranks=rank_anatomy())
    panel.show(told)
    by_rank.show(told)

    assert panel.table.content.count("no GPU") == 4
    assert "2.00 GiB" in panel.table.content or "2 GiB" in panel.table.content
    assert "forward backward" in by_rank.table.content
    assert "100 ms" in by_rank.table.content
    assert NO_PSUTIL not in panel.note.text

    panel.show(shown(ranks=rank_anatomy(cpu=None, device="NVIDIA H200")))

    assert NO_PSUTIL in panel.note.text
    assert "pynvml" in panel.note.text
    assert "no GPU" not in panel.table.content


@pytest.mark.usefixtures("page")
def test_name_of_a_machine_cannot_be_markup() -> None:
    panel = Workers()

    panel.show(shown(ranks=rank_anatomy().model_copy(update={"hosts": ["<b>a", "b"]})))

    assert "<b>a" not in panel.table.content


@pytest.mark.usefixtures("page")
def test_layers_and_spectra_stay_until_newer_ones_are_told() -> None:
    table, chart = LayersPanel(), SpectraPanel()
    told = anatomy(STARTED, spans("newest", records(), 3))
    for one in (told, shown()):
        table.show(one)
        chart.add(one)

    assert [row["name"] for row in table.table.rows] == ["2", "0"]  # the lowest cosine first
    assert table.note.text == "2 layers at step 16, lowest cosine 0.03125, KL of the step 0.16"
    assert chart.whole.visible
    assert chart.chart.options["yAxis"]["data"] == ["0.A", "0.G"]
    assert chart.chart.options["series"][1]["data"] == [[0.05, 0]]
    assert min(chart.chart.options["series"][0]["data"][1]["value"]) > 0  # a logarithm has no 0
    assert chart.sentence().startswith("highest condition number with damping infinite, of 0.G")
    assert chart.sentence().endswith("of 2 factors; 1 estimated, with dashed boxes")
    assert chart.csv().splitlines()[1] == "0.A,0.1,0.1,0.2,0.3,0.5,0.05,4.0,estimated,8"
    assert chart.rows()[1]["from"] == "exact"


@pytest.mark.usefixtures("page")
def test_bytes_so_far_stand_beside_those_of_steps_that_save_nothing() -> None:
    chart = Cumulative(View())
    chart.per_step = {ALL_REFRESHED: 400.0, SGD: 50.0}

    chart.replace({SENT: [(11, 100.0), (12, 200.0)]})
    chart.extend({SENT: [(20, 1000.0)]})

    assert chart.points[ALL_REFRESHED] == [(11, 400.0), (12, 800.0), (20, 4000.0)]
    assert chart.points[SGD][-1] == (20, 500.0)
    assert chart.sentence() == (
        "rank 0 has sent 1000 B by step 20; 25% of refreshing all at each step; 200% of SGD's bytes"
    )
    assert chart.ranges["yAxis"][0]["max"] >= 4000


@pytest.mark.usefixtures("page")
def test_one_rank_has_no_bytes_to_show() -> None:
    chart = Cumulative(View())

    chart.replace({SENT: [(1, 0.0), (2, 0.0)]})

    assert not any(chart.points.values())


def test_trust_tells_the_update_beside_the_gradient(page: Client) -> None:
    trust = Trust(View())

    trust.replace({name: [(1, 0.25)] for name in ("layers.lowest_cosine", "layers.kl", "layers.clip_factor")})

    said = "lowest cosine of gradient and update 0.25; KL of a step 0.25; clip factor 0.25"
    assert said in trust.note.text

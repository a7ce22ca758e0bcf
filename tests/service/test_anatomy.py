"""What is told now and then of layers, factors and ranks: kept, read and shown."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from nicegui import Client

from ngd_service.api.series import anatomy, curves
from ngd_service.dashboard.cumulative import ALL_REFRESHED, SENT, SGD, Cumulative
from ngd_service.dashboard.inversions import InversionsPanel, seconds_by_rank
from ngd_service.dashboard.layers import LayersPanel, SpectraPanel
from ngd_service.dashboard.ranks import NO_PSUTIL, PhasesByRank, Workers, straggler
from ngd_service.dashboard.trust import Trust
from ngd_service.dashboard.view import View
from ngd_service.resources import Anatomy, FactorInversion, RankAnatomy
from ngd_service.store.spans import KINDS, Name, Span, Spans, fold
from ngd_workers.contract.events import Judged, Layers, Ranks, StepRecord

STARTED = {
    "layers": ["0", "2"], "statistics": ["0.A", "0.G", "2.A", "2.G"], "hosts": ["a", "b"], "device": "cpu",
    "owners": [0, 0, 1, None], "world_size": 2,
}  # fmt: skip


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


def judged(methods: dict[str, list[int]], failed: dict[int, str] | None = None) -> Judged:
    """The statistics 0 to 2 under a fixed interval, so that nothing else was measured of them."""
    unmeasured = [None] * 3
    return Judged(
        statistics=[0, 1, 2],
        changes=unmeasured,
        noises=unmeasured,
        thresholds=unmeasured,
        errors=unmeasured,
        failed=failed or {},
        residuals=[1e-6, 2e-6, None],
        inversion_seconds=[0.1, 0.2, None],
        methods=methods,
    )


def records() -> list[StepRecord]:
    """Twenty steps: layers are told in three of them, ranks in two, inversions in two."""
    told: dict[int, dict[str, Any]] = {
        2: {"layers": layers(1, {0: [0.0, 0.1, 0.2, 0.3, 0.4, 0.05, 9.0], 1: [0.0, 0.0, 0.0, 0.0, 1.0, None, None]})},
        3: {"judged": judged({"CHOLESKY": [0, 1]})},
        9: {"layers": layers(8, {0: [0.1, 0.1, 0.2, 0.3, 0.5, 0.05, 4.0]}, estimated=[0]), "ranks": ranks(1.0)},
        12: {"judged": judged({"NEWTON_SCHULZ": [0]}, {2: "NON_FINITE"})},
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
    assert [(one.name, one.step, one.method, one.ending) for one in told.inversions] == [
        ("0.A", 12, "NEWTON_SCHULZ", "OK"),
        ("0.G", 3, "CHOLESKY", "OK"),
        ("2.A", 12, None, "NON_FINITE"),
    ]
    assert [(one.owner, one.residual, one.seconds) for one in told.inversions] == [
        (0, 1e-6, 0.1), (0, 2e-6, 0.2), (1, None, None),
    ]  # fmt: skip
    assert told.ranks is not None
    assert (told.ranks.step, told.ranks.cpu, told.ranks.hosts) == (18, [2.0, 2.0], ["a", "b"])
    assert told.last_step == 20


def test_what_was_told_before_another_number_of_ranks_or_layers_is_left_out() -> None:
    told = anatomy(STARTED | {"hosts": ["a"], "layers": ["0", "2", "4"]}, spans("newest", records(), 0))

    assert (told.layers, told.ranks) == (None, None)


def test_job_of_an_earlier_version_tells_nothing() -> None:
    told = anatomy({"statistics": ["0.A"], "device": "cpu"}, spans("newest", records()[:1], 0))

    assert (told.layers, told.spectra, told.ranks) == (None, [], None)


def test_failures_of_a_version_that_tells_no_methods_are_no_inversions() -> None:
    told = json.loads(records()[11].model_dump_json())
    for field in ("methods", "residuals", "inversion_seconds"):
        del told["judged"][field]
    stored = json.loads(StepRecord.model_validate(told).model_dump_json())

    assert [KINDS["newest"].of_record(record) for record in (told, stored)] == [{}, {}]


def test_fixed_intervals_have_no_reasons_though_their_inversions_are_told() -> None:
    known = spans("statistics", [one.model_copy(update={"ages": [0] * 4}) for one in records()], 3)

    assert [span.content.get("judged", {}) for span in known.spans] == [{}, {}, {}]
    assert [span.content.get("failed", {}) for span in known.spans] == [{}, {"2": "NON_FINITE"}, {}]


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


def inversion(name: str, owner: int | None, seconds: float | None, **more: Any) -> FactorInversion:
    told = {"step": 5, "method": "CHOLESKY", "residual": None, "ending": "OK"} | more
    return FactorInversion(name=name, owner=owner, seconds=seconds, **told)


def test_another_placement_takes_the_longest_layer_first_and_leaves_its_factors_together() -> None:
    known = [
        inversion("a.A", 0, 3.0), inversion("a.G", 0, 1.0), inversion("b.x.A", 0, 3.0), inversion("c.A", 1, 2.0),
        inversion("d.A", None, 0.5), inversion("e.A", 1, None),
    ]  # fmt: skip

    placed, replaced = seconds_by_rank(known, 2)

    assert placed == [7.5, 2.5]
    assert replaced == [4.5, 5.5]  # a alone; b and c; d on both
    assert seconds_by_rank([], 2) == ([0.0, 0.0], [0.0, 0.0])


@pytest.mark.usefixtures("page")
def test_inversions_of_two_ranks_stand_beside_another_placement() -> None:
    panel = InversionsPanel()
    assert not panel.whole.visible
    known = [
        inversion("a.A", 0, 0.003, residual=1e-6),
        inversion("b.A", 0, 0.002, residual=4e-5, method="WARM_NEWTON_SCHULZ"),
        inversion("c.A", 1, 0.001, ending="INACCURATE", residual=0.2),
        inversion("d.A", 1, None, ending="NON_FINITE", method=None),
        inversion("e.A", None, 0.001, method="EIGENDECOMPOSITION"),
    ]

    panel.show(shown(inversions=known[1:], world_size=2))
    panel.show(shown(inversions=known[:1], world_size=2))
    panel.show(shown(world_size=2))

    assert [row["name"] for row in panel.table.rows] == ["c.A", "d.A", "b.A", "a.A", "e.A"]
    assert [row["owner"] for row in panel.table.rows] == ["rank 1", "rank 1", "rank 0", "rank 0", "every rank"]
    assert panel.table.rows[2]["method"] == "Newton-Schulz from the old inverse"
    assert (panel.table.rows[2]["residual"], panel.table.rows[2]["seconds"]) == ("4e-05", "2 ms")
    assert panel.figure.visible
    assert [series["data"] for series in panel.chart.options["series"]] == [
        pytest.approx([0.006, 0.002]), pytest.approx([0.004, 0.004]),
    ]  # fmt: skip
    assert panel.note.text == (
        "5 factors, 2 failed; largest residual 0.2, of c.A; rank 0 inverts longest, 6 ms; if layers were placed by "
        "these times, longest first, the busiest rank would take 4 ms; mean 4 ms; measured at each factor's newest "
        "refresh"
    )


@pytest.mark.usefixtures("page")
def test_one_rank_has_no_placement() -> None:
    panel = InversionsPanel()
    panel.show(shown(inversions=[inversion("a.A", 1, 0.003)], world_size=2))
    panel.show(shown(inversions=[inversion("b.A", 0, 0.003)], world_size=1))

    assert panel.note.text == "1 factor"
    assert not panel.figure.visible
    assert [row["name"] for row in panel.table.rows] == ["b.A"]  # the others' owners are those of another start


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

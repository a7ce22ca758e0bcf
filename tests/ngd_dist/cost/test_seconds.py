"""The planner's seconds: arithmetic that can be checked by hand, and rates that a run gives back."""

import pytest

from ngd_dist.config import NGDConfig
from ngd_dist.cost.calibration import Measured, StepSeconds, calibrated
from ngd_dist.cost.card import ModelCard
from ngd_dist.cost.cluster import PRESETS, Cluster, Device, Link
from ngd_dist.cost.plan import plan
from ngd_dist.cost.seconds import Network, seconds
from ngd_dist.cost.setup import FirstOrder, Setup
from ngd_dist.errors import ConfigError

LAYERS = [
    {"name": "a", "inputs": 300, "outputs": 200, "positions": 4},
    {"name": "b", "inputs": 201, "outputs": 50, "positions": 1},
]
CARD = ModelCard.model_validate({"layers": LAYERS, "forward_flops": 1e6})
EVERY_STEP = {"kind": "fixed", "steps": 1}


def config(**settings: object) -> NGDConfig:
    return NGDConfig.model_validate({"ema_decay": 0.5, "staleness": EVERY_STEP} | settings)


def device(**changes: float) -> Device:
    return PRESETS["v100"].model_copy(update=changes)


def test_forward_and_backward_take_three_times_the_operations_of_forward() -> None:
    cluster = Cluster(device=device(tflops=1e-3, efficiency=0.5, layer_us=1000))  # 0.5e9 operations a second

    phases = seconds(Setup(CARD, FirstOrder("sgd", 1), 1, samples=100, micro_batches=2), cluster)

    assert phases["forward_backward"] == pytest.approx(3 * 1e6 * 100 / 0.5e9 + 2 * 2 * 1e-3)
    assert phases["refresh"] == phases["communication"] == 0


def test_a_refresh_is_inverted_once_in_an_interval_by_the_owner_with_most() -> None:
    cluster = Cluster(devices_per_node=2, device=device(tflops=1e-3, inverse_efficiency=1))
    sharded = {"strategy": {"kind": "owner_sharded", "replicate_below": 0}, "stagger": 0}
    a, b = 2 * (300**3 + 200**3), 2 * (201**3 + 50**3)

    alone = seconds(Setup(CARD, config(stagger=0), 1, 8), cluster)["refresh"]
    two = seconds(Setup(CARD, config(**sharded), 2, 8), cluster)["refresh"]
    rarely = seconds(Setup(CARD, config(**sharded, staleness={"kind": "fixed", "steps": 10}), 2, 8), cluster)["refresh"]

    assert alone == pytest.approx((a + b) / 1e9)
    assert two == pytest.approx(a / 1e9)
    assert rarely == pytest.approx(a / 1e10)


def test_ranks_wait_for_the_one_that_refreshes() -> None:
    cluster = Cluster(devices_per_node=2, device=device(tflops=1e-3, inverse_efficiency=1))
    sharded = {"strategy": {"kind": "owner_sharded", "replicate_below": 0}, "staleness": {"kind": "adaptive"}}
    a, b = 2 * (300**3 + 200**3), 2 * (201**3 + 50**3)

    phases = seconds(Setup(CARD, config(**sharded), 2, 8, refresh_share=0.25), cluster)

    assert phases["refresh"] == pytest.approx((0.25 * a + 0.75 * 0.25 * b) / 1e9)


def test_a_message_takes_its_latency_and_its_bytes() -> None:
    assert Link(latency_us=10, gb_s=2).seconds(1e9, 3) == pytest.approx(0.5 + 3e-5)
    links = {"inside": {"gb_s": 40}, "between": {"latency_us": 0, "gb_s": 10}}
    network = Network(Cluster.model_validate({"nodes": 2, "devices_per_node": 4, "device": "v100"} | links), 8)

    assert network.exchange(7e9, 7) == pytest.approx(4 * 4e9 / 10e9)  # four ranks of a node share its link
    assert network.all_reduce(1e9) == pytest.approx(0.1)
    assert network.bytes_between(1.0, 7.0) == pytest.approx(1 + 16)


def test_calibration_gives_back_the_rates_of_the_device_that_was_measured() -> None:
    true = device(tflops=1e-3, efficiency=0.4, statistics_efficiency=0.5, apply_efficiency=0.6, inverse_efficiency=0.7,
                  memory_gb_s=3.0, layer_us=100.0, refresh_us=200.0, in_turn_us=50.0)  # fmt: skip
    plain, full = config(staleness={"kind": "fixed", "steps": 2}, stagger=0), config(stagger=0)
    steps = []
    for samples in (32, 64):
        phases = seconds(Setup(CARD, full, 1, samples), Cluster(device=true))
        no_refresh = sum(phases[name] for name in ("forward_backward", "apply", "update"))
        parts = {"apply": phases["apply"], "update": phases["update"]}
        capture = phases["statistics"] - len(LAYERS) * true.refresh_us / 1e6
        refresh = parts | {"refresh": phases["refresh"], "capture": capture}
        steps.append(StepSeconds(samples=samples, refreshes=False, seconds=no_refresh, phases=parts))
        steps.append(StepSeconds(samples=samples, refreshes=True, seconds=sum(phases.values()), phases=refresh))

    in_turn = config(staleness={"kind": "fixed", "steps": 2}, stagger=1)
    in_turn_s = sum(seconds(Setup(CARD, in_turn, 1, 32), Cluster(device=true)).values())
    run = Measured(device="x", card=CARD, optimizer=plain, in_turn_s=in_turn_s, steps=tuple(steps))
    given = calibrated(device(tflops=1e-3), run)

    expected = true.model_dump() | {"name": "x"}
    assert given.model_dump() == {k: v if isinstance(v, str) else pytest.approx(v) for k, v in expected.items()}


def test_a_device_that_is_faster_than_its_given_peak_gets_another_peak() -> None:
    true = device(tflops=1e-3, efficiency=1.0)
    steps = []
    for samples in (32, 64):
        for refreshes in (False, True):
            phases = seconds(Setup(CARD, config(), 1, samples), Cluster(device=true))
            taken = sum(phases.values()) if refreshes else phases["forward_backward"]
            steps.append(StepSeconds(samples=samples, refreshes=refreshes, seconds=taken))

    given = calibrated(device(tflops=1e-4), Measured(device="x", card=CARD, optimizer=config(), steps=tuple(steps)))

    assert given.tflops * given.efficiency == pytest.approx(1e-3)


def test_a_run_that_lacks_a_kind_of_step_is_refused() -> None:
    step = StepSeconds(samples=8, refreshes=False, seconds=1.0)
    same = Measured(device="x", card=CARD, optimizer=config(), steps=(step,) * 4)
    other = StepSeconds(samples=4, refreshes=False, seconds=1.0)
    lacking = Measured(device="x", card=CARD, optimizer=config(), steps=(step, step, step, other))

    with pytest.raises(ConfigError, match=r"two numbers of samples, got \[8\]"):
        calibrated(PRESETS["cpu"], same)
    with pytest.raises(ConfigError, match="it has none of 4 samples with one"):
        calibrated(PRESETS["cpu"], lacking)


def test_a_run_that_tells_nothing_of_a_sample_is_refused() -> None:
    steps = [
        StepSeconds(samples=samples, refreshes=refreshes, seconds=1.0)
        for samples in (1, 2)
        for refreshes in (False, True)
    ]

    with pytest.raises(ConfigError, match="took no longer than one of 1"):
        calibrated(PRESETS["cpu"], Measured(device="x", card=CARD, optimizer=config(), steps=tuple(steps)))


def test_a_run_that_refreshes_in_each_step_says_nothing_of_turns() -> None:
    steps = [
        StepSeconds(samples=samples, refreshes=refreshes, seconds=samples)
        for samples in (1, 2)
        for refreshes in (False, True)
    ]
    run = Measured(device="x", card=CARD, optimizer=config(), in_turn_s=9.0, steps=tuple(steps))

    assert calibrated(PRESETS["cpu"], run).in_turn_us == 0


def test_presets_can_be_changed_in_part() -> None:
    cluster = Cluster.model_validate({"device": {"preset": "h100", "memory_gib": 94}})

    assert (cluster.device.memory_gib, cluster.device.tflops) == (94, PRESETS["h100"].tflops)


def test_an_owner_with_too_much_traffic_is_warned_of() -> None:
    cluster = Cluster.model_validate({"nodes": 128, "devices_per_node": 8, "device": "h100"})
    wide = ModelCard.model_validate(
        {"layers": [{"name": "a", "inputs": 4096, "outputs": 4096, "positions": 1}], "forward_flops": 3e7}
    )

    half = NGDConfig.model_validate({"strategy": {"kind": "owner_sharded", "fraction": 0.5}})

    assert "take strategy.fraction 0 or 1" in plan(Setup(wide, half, 1024, 8), cluster).warnings[0]
    assert plan(Setup(wide, NGDConfig(), 1024, 8), cluster).warnings == []

"""Bytes are counted by kind, and what a link costs is told or left out by name."""

import pytest

from benchmarks import comm_volume
from benchmarks.models import count_parameters, model_of

PLAIN = [{"loss": 2.0, "bytes": {"statistics": 8, "gradients": 2}}, {"loss": 1.0, "bytes": {"gradients": 2}}]
NO_LINK = {"model": "mlp", "ranks": 2, "mbit": 1, "rows": "unshare: Operation not permitted"}


def test_bytes_are_means_over_ranks_and_steps() -> None:
    found = comm_volume.row("adaptive", "mlp", 2, 8, 2, [PLAIN, PLAIN[::-1]])

    assert found["bytes"] == dict.fromkeys(comm_volume.KINDS, 0) | {"statistics": 4, "gradients": 2}
    assert found["statistics_last_half"] == 4
    assert found["smoothed"] == [1.5, 1.5]


@pytest.mark.slow
@pytest.mark.ranks
def test_every_setting_is_held_against_a_refresh_in_every_step() -> None:
    names = ("every step", "every step, bfloat16", "adaptive, held by all")
    rows = comm_volume.measure([("mlp", 2, 8, 2, names)])

    sgd, every_step, rounded, everywhere = rows
    gradients = 4 * count_parameters(model_of("mlp"))  # of two ranks each sends half of the buffer twice
    assert sgd["bytes"]["gradients"] == gradients
    assert every_step["bytes"]["gradients"] + every_step["bytes"]["directions"] == pytest.approx(gradients, rel=0.01)
    assert rounded["bytes"]["statistics"] == pytest.approx(every_step["bytes"]["statistics"] / 2, rel=0.01)
    assert everywhere["bytes"]["inverses"] > 0 == everywhere["bytes"]["directions"]
    assert "| every step | " in comm_volume.table({"rows": rows, "wire": [], "link": NO_LINK, "note": ""})


def test_a_link_that_can_not_be_made_is_left_out_by_name() -> None:
    assert comm_volume.table({"rows": [], "wire": [], "link": NO_LINK, "note": ""}).endswith(
        "Not measured: unshare: Operation not permitted."
    )


def test_16_bits_cost_no_more_than_their_rounding(tiny_model: str) -> None:
    bfloat16, float16 = (found["errors"] for found in comm_volume.wire_errors(tiny_model, 32))

    assert 0 < bfloat16["A"] <= 2**-8  # of each entry
    assert 0 < float16["A"] <= 2**-10  # and what it loses of its smallest ones
    assert float16["direction"] < bfloat16["direction"] < 0.05

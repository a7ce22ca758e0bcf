"""Bytes are those of the tensors, by kind."""

import pytest

from benchmarks import memory
from benchmarks.models import count_parameters, model_of


def test_sgd_holds_weights_gradients_and_momentum(tiny_model: str) -> None:
    found = memory.row("sgd", tiny_model, 8)

    model = model_of(tiny_model)
    assert {found["bytes"][kind] for kind in ("weights", "gradients", "momentum")} == {4 * count_parameters(model)}
    assert found["bytes"]["buffers"] == sum(b.nbytes for b in model.buffers())
    assert found["bytes"]["statistics"] == found["bytes"]["inverses"] == 0


def test_ngd_holds_an_inverse_for_each_factor_and_nothing_unnamed(tiny_model: str) -> None:
    found = memory.row("ngd", tiny_model, 8)["bytes"]

    factors = (10**2 + 4**2) + (37**2 + 8**2) + (9**2 + 10**2)
    norm = 4 * 3  # of each channel's 2 x 2 block
    assert found["inverses"] == 4 * (factors + norm)
    assert found["statistics"] >= found["inverses"]
    assert found["other"] < 100


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_share_the_inverses() -> None:
    # Fewer samples would stand for the factors in one process, where the cache is then smaller.
    rows = memory.measure(["mlp"], ["ngd"], 1024, world_size=2)

    alone, *shared = (row["bytes"]["inverses"] for row in rows)
    assert [row["ranks"] for row in rows] == [1, 2, 2]
    assert sum(shared) == alone
    assert "| ngd | 1 |" in memory.table({"rows": rows, "left_out": {}})

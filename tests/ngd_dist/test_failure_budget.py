"""A run stops by one clear error once too many inversions have failed, on every rank, its weights as they were."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.errors import InversionError
from tests.support.ranks import run_ranks

BOUND = 3


def run_until_it_stops(rank: int, world_size: int, max_failed_inversions: int | None) -> tuple[int, str, bool]:
    """Returns the steps that were taken, the error, and whether it left the weights alone. A is 0: without damping it
    has no inverse, so that one inversion in each step fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    config = NGDConfig(damping=0.1, staleness=FixedInterval(), max_failed_inversions=max_failed_inversions)
    optimizer = NGD(model, config, param_groups=[{"params": layer.parameters()} for layer in model])
    optimizer.param_groups[0]["damping"] = 0.0
    x, y = torch.zeros(4, 3), torch.randint(2, (4,))
    message, is_kept = "", True
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        try:
            optimizer.step()
        except InversionError as error:
            message = str(error)
            is_kept = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            break
    return optimizer.stats.step, message, is_kept


def test_a_run_stops_when_too_many_inversions_have_failed() -> None:
    steps, message, is_kept = run_until_it_stops(0, 1, BOUND)

    assert 0 < steps < 6
    assert message.startswith(
        "4 inversions have failed, of which max_failed_inversions allows 3; the last was that of 0."
    )
    assert "raise damping" in message
    assert is_kept


def test_without_a_bound_a_run_goes_on() -> None:
    assert run_until_it_stops(0, 1, None) == (6, "", True)


@pytest.mark.ranks
def test_all_ranks_stop_at_the_same_step() -> None:
    first, second = run_ranks(2, run_until_it_stops, BOUND)

    assert first == second
    assert first[1]
    assert first[2]


@pytest.mark.parametrize("preconditioner", [{"kind": "ekfac"}, {"kind": "kfac", "damping_form": "exact"}])
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"inversion": {"kind": "cholesky"}}, "inversion cholesky"),
        ({"inverse_dtype": "float16"}, "inverse_dtype float16"),
    ],
)
def test_a_setting_of_inversion_that_is_not_read_is_refused(
    preconditioner: dict[str, str], setting: dict[str, object], named: str
) -> None:
    with pytest.raises(ValidationError, match=f"inverts no factor: leave out {named}"):
        NGDConfig.model_validate({"preconditioner": preconditioner} | setting)

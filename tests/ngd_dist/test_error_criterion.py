"""Inverses that are good enough for a new value stay in use: `AdaptiveInterval.criterion`."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, KFAC, LNGD, AdaptiveInterval, Settings
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.diagonal import Diagonal
from ngd_dist.inversion import error_of
from ngd_dist.preconditioners import preconditioner_for
from ngd_dist.statistics.staleness import Schedule, Verdict, judge_error
from ngd_dist.statistics.statistic import Key
from tests.support.refreshing import refresh
from tests.support.tensors import F64
from tests.support.work import together

ERROR = AdaptiveInterval(criterion="error")


def spd(n: int, seed: int = 0) -> Tensor:
    rows = torch.randn(1, 3 * n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return rows.mT @ rows / (3 * n)


def test_error_is_the_norm_of_what_the_inverse_leaves_of_the_identity() -> None:
    X, damping, identity = spd(40), torch.tensor([0.1], dtype=F64), torch.eye(40, dtype=F64)
    inverse = torch.linalg.inv(X + 0.1 * identity)
    moved = 1.3 * X

    dense = torch.linalg.norm(identity - (moved + 0.1 * identity) @ inverse) / 40**0.5

    assert float(error_of(X, damping, inverse)) < 1e-12
    # Four probes estimate the square of the norm to about sqrt(2 / (4 n)) = 11 %, the norm to half of that.
    assert float(error_of(moved, damping, inverse)) == pytest.approx(float(dense), rel=0.15)


def test_error_of_a_diagonal_factor_is_exact() -> None:
    X, inverse = torch.tensor([[1.0, 3.0]], dtype=F64), torch.tensor([[0.5, 0.125]], dtype=F64)

    error = Diagonal((1, 2)).error(X, torch.ones(1, dtype=F64), inverse)

    assert error is not None
    assert float(error) == pytest.approx((0.5**2 / 2) ** 0.5)  # 1 - 2 / 2 and 1 - 4 / 8


def test_error_of_a_basis_is_what_it_leaves_off_the_diagonal() -> None:
    method = preconditioner_for(LayerShape("layer", "kronecker", 6, 4), NGDConfig(preconditioner=EKFAC()))
    statistics = {"A": spd(6), "G": spd(4)}
    cache = refresh(method, statistics, frozenset({"A", "G"}), 0.1, None).cache
    assert cache is not None
    moved, U = spd(6, seed=1), cache["A"]

    error, B = method.error("A", {"A": moved}, 0.1, cache), U.mT @ moved @ U

    off = B - torch.diag_embed(B.diagonal(dim1=-2, dim2=-1))
    assert error is not None
    assert float(error) == pytest.approx(float(torch.linalg.norm(off) / torch.linalg.norm(B)))
    unmoved = method.error("A", statistics, 0.1, cache)
    assert unmoved is not None
    assert float(unmoved) < 1e-7  # the root of a difference that rounding leaves


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(0.0, Verdict.SETTLED), (0.09, Verdict.SETTLED), (0.1, Verdict.MOVING), (0.19, Verdict.MOVING)]
    + [(error, Verdict.CHANGED) for error in (0.2, float("inf"), float("nan"))],
)
def test_an_error_is_judged_by_the_threshold_and_half_of_it(error: float, verdict: Verdict) -> None:
    assert judge_error(error, 0.2) is verdict


class Fed:
    """A linear layer whose optimizer sees inputs of a chosen size, with one output gradient for all of them."""

    def __init__(self, preconditioner: Settings, staleness: AdaptiveInterval = ERROR) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3, bias=False).double()
        config = {"preconditioner": preconditioner, "staleness": staleness, "lr": 1e-9, "damping": 0.1}
        self.optimizer = NGD(self.model, NGDConfig.model_validate({**config, "stagger": 0.0}))
        self.x, self.y = torch.randn(16, 4, dtype=F64), torch.randint(3, (16,))

    def step(self, size: float = 1.0) -> dict[str, Tensor]:
        """Returns the cache after one step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(size * self.x), self.y).backward()
        self.optimizer.step()
        return dict(self.optimizer._curvature.caches[""] or {})

    def errors(self) -> dict[str, float]:
        return {refresh.statistic.rpartition(".")[2]: refresh.error for refresh in self.optimizer.stats.refreshes}


@pytest.mark.parametrize("preconditioner", [KFAC(), LNGD()])
def test_an_inverse_that_is_good_enough_stays_and_its_interval_grows(preconditioner: Settings) -> None:
    fed = Fed(preconditioner)
    first = fed.step()

    later = [fed.step(1.01) for _ in range(5)]  # X moves by 2 %

    assert all(torch.equal(cache[name], first[name]) for cache in later for name in first)
    assert min(track.interval for track in fed.optimizer._schedule.tracks.values()) >= 3


@pytest.mark.parametrize("preconditioner", [KFAC(), LNGD()])
def test_an_inverse_that_is_wrong_is_made_anew(preconditioner: Settings) -> None:
    fed = Fed(preconditioner)
    first = fed.step()
    name = fed.optimizer._schedule.due(2)[0].statistic

    second = fed.step(3.0)

    assert fed.errors()[name] > 0.25
    assert not torch.equal(second[name], first[name])


def test_the_change_of_what_is_kept_adds_up() -> None:
    """Each step's value is within the threshold of the last one, but not of the one that the inverse was made of."""
    fed = Fed(KFAC())
    first = fed.step()

    caches = [fed.step(1.06**k) for k in range(1, 6)]

    assert torch.equal(caches[0]["A"], first["A"])
    assert not torch.equal(caches[-1]["A"], first["A"])


@pytest.mark.parametrize("make", [lambda: KFAC(damping_form="exact"), lambda: KFAC(rows=2)])
def test_what_has_no_inverse_of_its_own_follows_its_change(make: Callable[[], Settings]) -> None:
    fed = Fed(make())
    fed.step()
    fed.step()

    assert set(fed.errors().values()) == {float("inf")}
    assert all(math.isfinite(refresh.change) for refresh in fed.optimizer.stats.refreshes)


def test_a_basis_that_stays_keeps_what_is_measured_in_it() -> None:
    keys = [Key("layer", name) for name in ("A", "G", "S")]
    schedule = Schedule(keys, together({"layer": 1}), ERROR, stagger=0, in_basis=keys[2:])
    schedule.advance(1, dict.fromkeys(keys[:2], Verdict.CHANGED))
    schedule.advance(2, {keys[2]: Verdict.CHANGED})
    before = schedule.tracks[keys[2]]
    step = max(track.due for track in schedule.tracks.values() if track != before)

    schedule.advance(step, dict.fromkeys([key for key in schedule.due(step) if key != keys[2]], Verdict.SETTLED))

    assert schedule.tracks[keys[2]].refreshed == 2


def test_a_threshold_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="criterion change measures no error"):
        AdaptiveInterval(error_threshold=0.5)


def test_settings_that_were_written_out_are_read_again() -> None:
    assert AdaptiveInterval.model_validate(AdaptiveInterval().model_dump()) == AdaptiveInterval()


def test_telemetry_tells_the_seconds_of_a_refresh_and_the_residual_of_its_new_inverse() -> None:
    fed = Fed(KFAC())

    fed.step()
    first = list(fed.optimizer.stats.refreshes)
    fed.step()
    kept = fed.optimizer.stats.refreshes

    assert all(refresh.seconds > 0 and refresh.residual < 1e-10 for refresh in first)
    assert all(refresh.seconds > 0 and math.isinf(refresh.residual) for refresh in kept)

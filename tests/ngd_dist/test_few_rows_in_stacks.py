"""Few rows beside the two other ways to less work: layers that are stacked, and statistics of a part of the batch."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import KFAC as KFACConfig
from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.form import FactorForm
from ngd_dist.preconditioners.factors import factor_forms
from ngd_dist.preconditioners.kfac import KFAC
from ngd_dist.step import agreement
from ngd_dist.step.agreement import Products
from tests.support.tensors import F64, weights

SAMPLES = 3
CHECK, LIMIT = "ngd_dist.preconditioners.kfac.ROWS_CHECK", "ngd_dist.covered.MAX_STACKED"
WIDE, SMALL = ("0", "2", "4"), ("6", "8", "10")


class Whole(KFAC):
    """K-FAC by whole matrices alone."""

    def forms(self, shape: LayerShape, config: KFACConfig, max_dense: int) -> Mapping[str, FactorForm]:
        return factor_forms(shape, max_dense)


def build_model() -> nn.Sequential:
    """Returns three wide layers and three small ones that are alike."""
    torch.manual_seed(0)
    linears = [nn.Linear(30, 24), nn.Linear(24, 24), nn.Linear(24, 6), *(nn.Linear(6, 6) for _ in SMALL)]
    return nn.Sequential(*(m for linear in linears for m in (linear, nn.Tanh()))).double()


def build(method: type[KFAC], patch: pytest.MonkeyPatch, **settings: Any) -> tuple[NGD, nn.Sequential]:
    patch.setattr(KFACConfig, "method", f"{method.__module__}:{method.__name__}")
    model = build_model()
    config = {"lr": 0.05, "damping": 0.01, "staleness": {"kind": "fixed"}} | settings
    return NGD(model, NGDConfig.model_validate(config)), model


def go_on(optimizer: NGD, model: nn.Sequential, steps: range, samples: int = SAMPLES, penalty: float = 0.0) -> None:
    """penalty: on the weights of the second small layer."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(samples, 30, dtype=F64, generator=generator), torch.arange(samples) % 6
        optimizer.zero_grad()
        output = model(x)
        optimizer.fisher_backward(output)
        penalised = model[int(SMALL[1])].weight
        assert isinstance(penalised, Tensor)
        (F.cross_entropy(output, y) + penalty * penalised.square().sum()).backward()
        optimizer.step()


def rows_of(optimizer: NGD, layer: str, factor: str = "A") -> int:
    """Returns the rows that the cache has in place of a matrix; 0 if it has the matrix."""
    cache = optimizer._curvature.caches[layer]
    assert cache is not None
    rows = cache.get(f"{factor} rows")
    return 0 if rows is None else rows.shape[1]


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-9, atol=1e-9)


def train_whole(
    patch: pytest.MonkeyPatch, steps: int, *, penalty: float = 0.0, samples: int = SAMPLES, **more: Any
) -> nn.Module:
    """Returns the model after these steps of whole matrices, with no stack and directions from `grad`."""
    with patch.context() as inside:
        inside.setattr(CHECK, 2**60)
        inside.setattr(LIMIT, 0)
        optimizer, model = build(Whole, inside, **more)
        go_on(optimizer, model, range(steps), samples, penalty)
    return model


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks the small layers alone, and takes each direction from rows that saves any product."""
    monkeypatch.setattr(LIMIT, 300)
    monkeypatch.setattr(CHECK, 0)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Notes the number of rows from which each layer's direction may be made, by step."""
    noted: list[dict[str, int]] = []
    shares_of = agreement.shares_of

    def watched(products: Mapping[str, Products]) -> dict[str, float]:
        noted.append({name: a.shape[1] for name, (_, a, _) in products.items()})
        return shares_of(products)

    monkeypatch.setattr("ngd_dist.curvature.shares_of", watched)
    return noted


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize(
    "staleness", [{"kind": "fixed"}, {"kind": "fixed", "steps": 3}, {"kind": "adaptive"}], ids=["1", "3", "adaptive"]
)
def test_stacked_layers_are_whole_beside_layers_of_rows(
    staleness: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, model = build(KFAC, monkeypatch, staleness=staleness)

    go_on(optimizer, model, range(6))

    assert sorted(len(stack.layers) for stack in optimizer._curvature.stacks) == [1, 1, 1, 3]
    assert [rows_of(optimizer, name) for name in WIDE + SMALL] == [SAMPLES] * 3 + [0] * 3
    assert_same(model, train_whole(monkeypatch, 6, staleness=staleness))


@pytest.mark.usefixtures("stacked")
def test_some_layers_of_a_stack_take_their_directions_from_rows(
    checked: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    apply_rows = KFAC.apply_rows

    def watched(method: KFAC, *arguments: Any) -> Tensor:
        taken.append(method.shape.name)
        return apply_rows(method, *arguments)

    monkeypatch.setattr(KFAC, "apply_rows", watched)
    optimizer, model = build(KFAC, monkeypatch)

    go_on(optimizer, model, range(5), penalty=0.01)

    assert set(SMALL) <= checked[-1].keys()
    assert [taken.count(name) for name in SMALL] == [4, 0, 4]  # the gradients of a step's rows come from the second on
    assert_same(model, train_whole(monkeypatch, 5, penalty=0.01))


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
@pytest.mark.parametrize("steps", [1, 3])
def test_rows_of_a_part_stand_for_statistics_and_not_for_the_gradient(
    fisher: str, steps: int, checked: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "fisher": {"kind": fisher},
        "staleness": {"kind": "fixed", "steps": steps},
        "statistics_fraction": 0.5,
    }
    optimizer, model = build(KFAC, monkeypatch, **settings)

    go_on(optimizer, model, range(6), samples=6)

    assert [rows_of(optimizer, name) for name in WIDE] == [3] * 3
    assert checked[0] == {}
    assert checked[-1].keys() >= {"0", "2"}
    assert {rows for step in checked for rows in step.values()} == {6}
    assert_same(model, train_whole(monkeypatch, 6, samples=6, **settings))


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize(("fraction", "pays"), [(1.0, True), (0.5, False)])
def test_it_counts_the_rows_of_the_whole_batch_whether_a_direction_is_cheaper_from_them(
    fraction: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, model = build(KFAC, monkeypatch, statistics_fraction=fraction)

    go_on(optimizer, model, range(1), samples=round(15 / fraction))  # whole matrices of 15 rows at width 24

    assert ("2" in optimizer._curvature.with_rows) is pays


def test_a_state_with_rows_loads_where_its_layers_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    every_third = {"kind": "fixed", "steps": 3}
    monkeypatch.setattr(LIMIT, 0)
    saver, model = build(KFAC, monkeypatch, staleness=every_third, stagger=0.0)
    go_on(saver, model, range(2))
    state, resumed_model = copy.deepcopy(saver.state_dict()), copy.deepcopy(model)
    monkeypatch.setattr(LIMIT, 300)
    resumed = NGD(resumed_model, saver.config)
    resumed.load_state_dict(state)
    loaded = [rows_of(resumed, name) for name in SMALL]

    go_on(saver, model, range(2, 4))
    go_on(resumed, resumed_model, range(2, 4))

    assert (rows_of(saver, SMALL[0]), loaded) == (SAMPLES, [0] * 3)
    assert_same(resumed_model, model)

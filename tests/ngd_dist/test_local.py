"""Statistics that stay on their ranks: each rank applies its own cache, and the directions are averaged.

Shown by SENG: its step on P ranks is the mean of P dense solutions, one for each rank's samples.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import NGD, NGDConfig, ShardedState
from ngd_dist.config import SENG, AdaptiveInterval, AllReduce, FixedInterval, KLClip, OwnerSharded, Thresholds
from ngd_dist.distributed.base import RefreshReport
from ngd_dist.inversion import Ending
from ngd_dist.inversion import Method as Inversion
from ngd_dist.preconditioners.seng import SENG as Method
from ngd_dist.statistics.staleness import Verdict
from ngd_dist.statistics.statistic import Key
from tests.reference.seng import direction
from tests.support.ranks import run_ranks
from tests.support.seng_steps import DAMPING, EXACT, batch, config, directions, expected, net
from tests.support.tensors import F64

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

# Settings beside the method, whether DDP averages gradients, and micro-batches.
CASES: dict[str, tuple[dict[str, Any], bool, int]] = {
    "owners": ({"strategy": OwnerSharded(replicate_below=0)}, False, 1),
    "small layers everywhere": ({}, False, 1),
    "held by all": ({"strategy": OwnerSharded(replicate_below=0, fraction=1.0)}, False, 1),
    "all_reduce": ({"strategy": AllReduce()}, False, 1),
    "one bucket": ({"bucket_mb": 0}, False, 1),
    "ddp": ({}, True, 1),
    "micro-batches": ({}, False, 2),
}
Ways = dict[str, Tensor]
STEPS, SAVED_AT = 3, 2


def in_all_cases(rank: int, world_size: int) -> dict[str, list[tuple[Ways, Ways]]]:
    """Returns, by case and kind, the directions of each step and those that the formula expects."""
    found: dict[str, list[tuple[Ways, Ways]]] = {}
    for case, (settings, is_ddp, passes) in CASES.items():
        for kind, method in EXACT.items():
            model = net()
            driven = DistributedDataParallel(model) if is_ddp else model
            optimizer = NGD(driven, config(method, micro_batches=passes, **settings))
            steps = []
            for step in range(STEPS):
                exact = expected(model, world_size, step)
                found_here = directions(driven, optimizer, step, rank, world_size, passes)
                steps.append(({name.removeprefix("module."): way for name, way in found_here.items()}, exact))
            found[f"{case} {kind}"] = steps
    return found


def clipped(rank: int, world_size: int) -> tuple[float, float]:
    """Returns <step, gradient> of a step that a KL clip has shortened, and its value by the rule of the clip.

    With lr 1 the clip makes nu^2 <d, grad> its bound, so that nu <d, grad> is sqrt(bound <d, grad>).
    """
    model, bound = net(), 1e-3
    whole = expected(model, world_size)
    optimizer = NGD(model, config(EXACT["explicit"], clip=KLClip(max_kl=bound)))
    x, y = batch()
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    ways, names = directions(model, optimizer, 0, rank, world_size), [name for name, _ in model.named_parameters()]

    def inner(of: Ways) -> float:
        return float(sum((of[name] * g).sum() for name, g in zip(names, gradients, strict=True)))

    return inner(ways), (bound * inner(whole)) ** 0.5


class Branches(nn.Module):
    """Two layers, of which a rank may run the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, both: Tensor) -> Tensor:
        output: Tensor = self.first(x)
        return output + self.second(x) if bool(both) else output


def where_one_rank_lacks_a_layer(rank: int, world_size: int) -> tuple[Tensor, Tensor, list[int]]:
    """Returns the second layer's direction, that of the rank that ran it, and the ages of its statistic."""
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = NGD(model, config(EXACT["explicit"]))
    generator, ages = torch.Generator().manual_seed(3), []
    x = torch.randn(2, 8, 3, dtype=F64, generator=generator)
    for both in ((0, 1), (0, 0), (0, 0)):
        optimizer.zero_grad()
        loss = model(x[rank], torch.tensor(both[rank])).square().sum(1).mean()
        before = model.second.weight.detach().clone()
        loss.backward()
        g = 2 * (model.first(x[1]) + model.second(x[1])).detach()
        rows = torch.cat([x[1], torch.ones(8, 1, dtype=F64)], dim=1)
        optimizer.step()
        ages.append(optimizer.stats.ages[optimizer.statistic_names.index("second.U")])
        if any(both):
            gradients = torch.einsum("no,ni->noi", g, rows).unsqueeze(1)
            exact = direction(gradients.mean(0) / world_size, gradients, DAMPING)[0]
            found = before - model.second.weight.detach()
    return found, exact[:, :-1], ages


def where_an_inversion_fails_on_one_rank(rank: int, world_size: int) -> dict[str, Any]:
    """Returns what all ranks say of a step in which rank 1 alone can't invert one layer, and of the step after it."""
    model = net()
    optimizer = NGD(model, config(EXACT["explicit"]))
    problems, outcomes = Method.problems, dict[str, Any]()

    def failing(self: Method, *args: Any) -> Any:
        made = problems(self, *args)
        if self.shape.name == "head":
            for problem in made.values():
                problem.factor.fill_(torch.nan)
        return made

    for step in range(2):
        if step == 0 and rank == 1:
            Method.problems = failing  # type: ignore[method-assign]
        x, y = batch(step)
        exact = expected(model, world_size, step)["head.weight"]
        own = expected_of_rank_0(model, x, y, world_size)
        ways = directions(model, optimizer, step, rank, world_size)
        Method.problems = problems  # type: ignore[method-assign]
        endings = {refresh.statistic: refresh.ending for refresh in optimizer.stats.refreshes}
        outcomes[f"step {step}"] = {
            "failed": optimizer.stats.failed_inversions,
            "endings": endings,
            "ages": optimizer.stats.ages,
            "way": ways["head.weight"],
            "mean": exact,
            "of rank 0": own,
        }
    return outcomes


def expected_of_rank_0(model: Any, x: Tensor, y: Tensor, world_size: int) -> Tensor:
    """Returns the head's direction, of the mean gradient with the samples of rank 0 alone."""
    half = len(x) // world_size
    h = torch.tanh(model.mixed(torch.tanh(model.conv(x)).mT)).mean(1).detach()
    g = torch.softmax(model.head(h), -1).detach() - F.one_hot(y, 3)
    gradients = torch.einsum("no,ni->noi", g, h).unsqueeze(1)
    return direction(gradients.mean(0), gradients[:half], DAMPING)[0]


def with_a_bad_statistic(rank: int, world_size: int) -> tuple[list[str], list[Tensor], int]:
    """Returns the endings of a step in which rank 1 has an infinite statistic and a finite gradient."""
    model = net().float()
    optimizer = NGD(model, config(SENG(max_explicit=0, q=None)))
    x, y = (of_all.chunk(world_size)[rank] for of_all in batch())
    F.cross_entropy(model(x.float()), y).backward()
    if rank == 1:
        key = Key("mixed", "U")
        optimizer._sync._kept[key] = torch.full_like(optimizer._capture.to_send()[key], torch.inf)
    optimizer.step()
    endings = [f"{refresh.statistic} {refresh.ending}" for refresh in optimizer.stats.refreshes]
    return endings, [p.detach().clone() for p in model.parameters()], optimizer.stats.failed_inversions


def adaptive(rank: int, world_size: int) -> list[tuple[list[int], list[int]]]:
    model = net()
    policy = AdaptiveInterval(thresholds=Thresholds(U=1.2))
    optimizer = NGD(model, config(EXACT["explicit"], staleness=policy, lr=0.05))
    found = []
    for step in range(8):
        directions(model, optimizer, step, rank, world_size)
        found.append((optimizer.stats.ages, optimizer.stats.intervals))
    return found


def resumed(rank: int, world_size: int, saved: Any) -> list[tuple[Ways, Ways]]:
    """Returns the steps after a load, and those that the formula expects of so many ranks."""
    model = net()
    optimizer = NGD(model, config(EXACT["implicit"], staleness=FixedInterval(steps=50)))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(copy.deepcopy(saved[1]))
    exact = expected(model, world_size, SAVED_AT)
    return [(directions(model, optimizer, SAVED_AT, rank, world_size), exact)]


def resumed_from(rank: int, world_size: int, saved: bytes, folder: str) -> list[list[tuple[Ways, Ways]]]:
    return [resumed(rank, world_size, pickle.loads(saved)), from_files(rank, world_size, folder)]


def saved(rank: int, world_size: int, folder: str) -> tuple[Any, Any]:
    """Returns the state after some steps of which the last refreshed nothing; writes it by dcp, too."""
    model = net()
    optimizer = NGD(model, config(EXACT["implicit"], staleness=FixedInterval(steps=50), stagger=0))
    for step in range(SAVED_AT):
        directions(model, optimizer, step, rank, world_size)
    assert optimizer.stats.refreshes == []
    dcp.save({"model": model.state_dict(), "optimizer": ShardedState(optimizer)}, checkpoint_id=folder)
    return model.state_dict(), optimizer.state_dict()


def from_files(rank: int, world_size: int, folder: str) -> list[tuple[Ways, Ways]]:
    model = net()
    optimizer = NGD(model, config(EXACT["implicit"], staleness=FixedInterval(steps=50), stagger=0))
    state = {"model": model.state_dict(), "optimizer": ShardedState(optimizer)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    exact = expected(model, world_size, SAVED_AT)
    return [(directions(model, optimizer, SAVED_AT, rank, world_size), exact)]


def everything(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    state = copy.deepcopy(saved(rank, world_size, folder))
    return {
        "cases": in_all_cases(rank, world_size),
        "clipped": clipped(rank, world_size),
        "lacking": where_one_rank_lacks_a_layer(rank, world_size),
        "failed": where_an_inversion_fails_on_one_rank(rank, world_size),
        "bad": with_a_bad_statistic(rank, world_size),
        "adaptive": adaptive(rank, world_size),
        "saved": state,
        "resumed": [resumed(rank, world_size, state), from_files(rank, world_size, folder)],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(2, everything, str(folder))


def close(steps: list[tuple[Ways, Ways]]) -> None:
    for found, exact in steps:
        assert found.keys() == exact.keys()
        for name, way in found.items():
            torch.testing.assert_close(way, exact[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_a_direction_is_the_mean_of_each_ranks_own(pair: list[dict[str, Any]], case: str, kind: str) -> None:
    for of_rank in pair:
        close(of_rank["cases"][f"{case} {kind}"])


@pytest.mark.ranks
def test_ranks_do_not_drift_apart_by_a_single_bit(pair: list[dict[str, Any]]) -> None:
    for case, steps in pair[0]["cases"].items():
        for (ours, _), (theirs, _) in zip(steps, pair[1]["cases"][case], strict=True):
            assert all(torch.equal(way, theirs[name]) for name, way in ours.items())


@pytest.mark.ranks
def test_it_is_not_the_direction_of_one_process(pair: list[dict[str, Any]]) -> None:
    found, _ = pair[0]["cases"]["owners explicit"][0]

    assert not torch.allclose(found["mixed.weight"], expected(net())["mixed.weight"], rtol=0.01)


@pytest.mark.ranks
def test_inner_products_are_those_of_the_mean_directions(pair: list[dict[str, Any]]) -> None:
    for of_rank in pair:
        inner, exact = of_rank["clipped"]
        assert inner == pytest.approx(exact, rel=1e-10)


@pytest.mark.ranks
def test_a_rank_without_a_cache_leaves_the_direction_to_the_others(pair: list[dict[str, Any]]) -> None:
    for of_rank in pair:
        found, exact, ages = of_rank["lacking"]
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        assert ages == [0, 1, 2]


@pytest.mark.ranks
def test_a_failed_inversion_on_one_rank_is_every_ranks(pair: list[dict[str, Any]]) -> None:
    for of_rank in pair:
        first, second = of_rank["failed"]["step 0"], of_rank["failed"]["step 1"]
        assert first["failed"] == second["failed"] == 1
        assert first["endings"] == {"conv.U": "OK", "mixed.U": "OK", "head.U": "NON_FINITE"}
        assert (first["ages"], second["ages"]) == ([0, 0, 1], [0, 0, 0])
        torch.testing.assert_close(first["way"], first["of rank 0"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(second["way"], second["mean"], rtol=1e-12, atol=1e-12)


@pytest.mark.ranks
def test_a_statistic_that_is_not_finite_on_one_rank_is_every_ranks(pair: list[dict[str, Any]]) -> None:
    for endings, weights, failed in (of_rank["bad"] for of_rank in pair):
        assert endings == ["conv.U OK", "mixed.U NON_FINITE", "head.U OK"]
        assert failed == 1
        assert all(bool(p.isfinite().all()) for p in weights)
        assert all(torch.equal(a, b) for a, b in zip(weights, pair[0]["bad"][1], strict=True))


@pytest.mark.ranks
def test_an_adaptive_schedule_is_the_same_on_all_ranks(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["adaptive"] == pair[1]["adaptive"]
    intervals = [interval for _, of_step in pair[0]["adaptive"] for interval in of_step]
    assert max(intervals) > 1
    assert min(intervals) == 1


@pytest.mark.ranks
def test_a_saved_state_is_the_same_on_all_ranks_and_has_nothing_local(pair: list[dict[str, Any]]) -> None:
    (_, state), (_, other) = (of_rank["saved"] for of_rank in pair)

    assert str(state) == str(other)
    assert all(layer == {"cache": None, "statistics": {}} for layer in state["ngd"]["layers"].values())
    assert state["ngd"]["damped_with"] == {}
    assert {(t["due"], t["refreshed"], t["interval"]) for t in state["ngd"]["tracks"].values()} == {(3, 0, 50)}


@pytest.mark.ranks
def test_a_loaded_run_measures_at_once_on_as_many_ranks(pair: list[dict[str, Any]]) -> None:
    for of_rank in pair:
        for steps in of_rank["resumed"]:
            close(steps)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_loaded_run_measures_at_once_on_any_number_of_ranks(
    pair: list[dict[str, Any]], folder: Path, world_size: int
) -> None:
    arguments = pickle.dumps(pair[0]["saved"]), str(folder)
    one = [resumed_from(0, 1, *arguments)] if world_size == 1 else run_ranks(world_size, resumed_from, *arguments)

    for of_rank in one:
        for steps in of_rank:
            close(steps)


@pytest.mark.ranks
def test_a_state_of_one_process_loads_on_two(tmp_path: Path) -> None:
    state = saved(0, 1, str(tmp_path))

    for of_rank in run_ranks(2, resumed_from, pickle.dumps(state), str(tmp_path)):
        for steps in of_rank:
            close(steps)


def test_nothing_is_averaged_in_one_process() -> None:
    assert not dist.is_initialized()
    model = net()
    optimizer = NGD(model, NGDConfig(preconditioner=SENG()))

    directions(model, optimizer)

    assert sum(optimizer.stats.bytes_sent.values()) == 0


SEEN = [Verdict.CHANGED, Verdict.MOVING, Verdict.SETTLED]


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        (SEEN, Verdict.CHANGED),
        (SEEN[1:], Verdict.MOVING),
        ([Verdict.SETTLED, Verdict.UNSEEN], Verdict.SETTLED),
        ([Verdict.UNSEEN, Verdict.UNSEEN], Verdict.UNSEEN),
        ([*SEEN, Verdict.UNUSABLE], Verdict.UNUSABLE),
        ([Verdict.UNUSABLE, Verdict.UNSEEN], Verdict.UNUSABLE),
    ],
)
def test_the_worst_verdict_of_the_ranks_that_saw_a_statistic_is_all_ranks(
    verdicts: list[Verdict], verdict: Verdict
) -> None:
    reports = [RefreshReport(each, Ending.OK, change=float(each)) for each in verdicts]

    for order in (reports, reports[::-1]):
        assert RefreshReport.of_ranks(order).verdict is verdict


def test_numbers_of_a_report_are_the_worst_of_all_ranks() -> None:
    one = RefreshReport(
        Verdict.CHANGED,
        Ending.OK,
        rows=8,
        change=0.5,
        residual=1e-9,
        threshold=0.2,
        seconds=1.0,
        method=Inversion.CHOLESKY,
    )
    other = RefreshReport(Verdict.SETTLED, Ending.OK, rows=8, change=0.1, residual=1e-6, threshold=0.1, seconds=3.0)

    both = RefreshReport.of_ranks([one, other])

    assert (both.rows, both.change, both.residual, both.threshold, both.seconds) == (8, 0.5, 1e-6, 0.1, 3.0)
    assert both.method is Inversion.CHOLESKY

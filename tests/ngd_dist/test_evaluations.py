"""Extra evaluations for the quadratic model agree with each other and leave no trace, in whatever wraps the model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist.step.quadratic import curvature_products, evaluate
from tests.support.objectives import objective_of, random_steps
from tests.support.tensors import F64


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def snapshot(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in (*model.parameters(), *model.buffers(), torch.get_rng_state())]


def disturbing_model() -> nn.Sequential:
    """Returns a model that draws random numbers and writes its buffers in every forward pass."""
    torch.manual_seed(0)
    parametrised = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), parametrised).double()


def test_evaluations_leave_buffers_weights_gradients_and_random_state() -> None:
    model = disturbing_model()
    objective = objective_of(model, torch.randn(8, 4, dtype=F64), torch.randint(3, (8,)))
    objective()[0].backward()
    tensors = [(name, id(value)) for name, value in (*model.named_parameters(), *model.named_buffers())]
    steps = random_steps(model)
    before, gradients = snapshot(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    curvature_products(model, objective, steps)
    evaluate(model, objective)

    assert all(map(torch.equal, snapshot(model), before))
    assert all(map(torch.equal, [p.grad for p in model.parameters() if p.grad is not None], gradients))
    assert [(name, id(value)) for name, value in (*model.named_parameters(), *model.named_buffers())] == tensors


def test_all_evaluations_see_the_same_random_numbers_and_buffers() -> None:
    model = disturbing_model()
    objective = objective_of(model, torch.randn(8, 4, dtype=F64), torch.randint(3, (8,)))
    step = random_steps(model, 1)[0]

    loss, products, _ = curvature_products(model, objective, [step, step])

    # With other dropout masks per evaluation the two columns of J d would differ, and so would the losses.
    assert products.unique().numel() == 1
    torch.testing.assert_close(evaluate(model, objective), loss, rtol=1e-14, atol=0)


def test_an_objective_that_raises_leaves_no_trace() -> None:
    model = disturbing_model()
    steps = random_steps(model)

    def objective() -> tuple[Tensor, Tensor]:
        model(torch.randn(8, 4, dtype=F64))
        raise RuntimeError("no such batch")

    before, parameters = snapshot(model), [id(p) for p in model.parameters()]
    for call in (lambda: curvature_products(model, objective, steps), lambda: evaluate(model, objective)):
        with pytest.raises(RuntimeError, match="no such batch"):
            call()

    assert all(map(torch.equal, snapshot(model), before))
    assert [id(p) for p in model.parameters()] == parameters


def test_weights_that_moved_inside_an_outer_autocast_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    wide = objective_of(model, torch.randn(8, 4), torch.randint(3, (8,)))

    def objective() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return wide()

    with torch.autocast("cpu", enabled=False):
        before, _ = objective()
        with torch.no_grad():
            model.weight.mul_(torch.randn_like(model.weight)).mul_(5)
        after = evaluate(model, objective)

    assert abs(float(after - before.detach())) > 0.1


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ddp_state(model: DistributedDataParallel) -> list[Any]:
    names = ["require_backward_grad_sync", "require_forward_param_sync", "find_unused_parameters", "static_graph"]
    return [getattr(model, name) for name in names] + [model._get_ddp_logging_data()["iteration"]]


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("knows_wrapper", [True, False])
def test_a_model_under_ddp_trains_on(options: dict[str, bool], knows_wrapper: bool) -> None:
    bare = network()
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))
    steps = random_steps(bare)
    _, expected, _ = curvature_products(bare, objective_of(bare, x, y), steps)

    with process_group():
        model = DistributedDataParallel(bare, **options)
        evaluations = list[int]()

        def objective() -> tuple[Tensor, Tensor]:
            evaluations.append(1)
            return objective_of(model, x, y)()

        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            before = ddp_state(model)
            _, products, _ = curvature_products(model if knows_wrapper else bare, objective, steps)
            evaluate(bare, objective)
            assert ddp_state(model) == before

    # Per step two in forward mode, one for the loss, one without gradients: nothing fell back to reverse mode.
    assert len(evaluations) == 3 * 4
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=0)


def test_a_compiled_model_is_evaluated_eagerly() -> None:
    bare = network()
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))
    steps, runs = random_steps(bare), list[int]()
    _, expected, _ = curvature_products(bare, objective_of(bare, x, y), steps)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        return lambda *args: (runs.append(1), graph.forward(*args))[1]

    model = torch.compile(bare, backend=backend)
    model(x)
    _, products, _ = curvature_products(model, objective_of(model, x, y), steps)

    assert len(runs) == 1
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=0)

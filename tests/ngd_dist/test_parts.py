"""Parts of the optimizer by themselves: what captures, what solves, what counts the seconds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngd_dist import NGD
from ngd_dist.capture.capture import Capture
from ngd_dist.capture.coverage import cover
from ngd_dist.config import FixedInterval, NGDConfig
from ngd_dist.covered import CoveredLayer, CoveredLayers
from ngd_dist.curvature import Curvature
from ngd_dist.distributed import GlobalMeans, build_sync
from ngd_dist.distributed.base import CaptureCount
from ngd_dist.distributed.comm import Communicator
from ngd_dist.engines import Engine
from ngd_dist.preconditioners import preconditioner_for
from ngd_dist.statistics.statistic import Key
from ngd_dist.telemetry import Stopwatch
from tests.support.tensors import F64

CONFIG = NGDConfig(damping=0.1, staleness=FixedInterval(), preconditioner={"kind": "kfac", "damping_form": "exact"})
A, G = Key("", "A"), Key("", "G")


def covered(model: nn.Module, config: NGDConfig) -> CoveredLayers:
    layers, _ = cover(model, set(model.parameters()), config)
    group = {"lr": config.lr, "damping": config.damping}
    return {layer.name: CoveredLayer(layer, preconditioner_for(layer.shape, config), group) for layer in layers}


def factors(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Returns E[a a^T] and E[g g^T], [1, n, n], from a layer's inputs and the gradients of each sample's own loss."""
    return (x.T @ x / len(x)).unsqueeze(0), (g.T @ g / len(g)).unsqueeze(0)


def test_capture_needs_a_model_its_layers_and_a_config() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3, bias=False, dtype=F64), torch.randn(16, 5, dtype=F64), torch.randint(3, (16,))
    capture = Capture(model, covered(model, CONFIG), CONFIG)

    capture.begin_step([A, G], step=1)
    output = model(x)
    F.cross_entropy(output, y).backward()

    expected_a, expected_g = factors(x, output.detach().softmax(1) - F.one_hot(y, 3))
    found = capture.take()
    torch.testing.assert_close(found[A], expected_a)
    torch.testing.assert_close(found[G], expected_g)


def test_closed_capture_sees_nothing() -> None:
    model = nn.Linear(5, 3, bias=False, dtype=F64)
    capture = Capture(model, covered(model, CONFIG), CONFIG)
    capture.begin_step([A, G], step=1)

    capture.close()
    model(torch.randn(16, 5, dtype=F64)).square().mean().backward()

    assert capture.take() == {}


def test_curvature_solves_with_the_means_that_it_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False, dtype=F64)
    layers = covered(model, CONFIG)
    sync = build_sync(
        CONFIG,
        Communicator(),
        {name: layer.method.refresh_flops() for name, layer in layers.items()},
        {name: layer.layout for name, layer in layers.items()},
        dtype=F64,
        device=torch.device("cpu"),
        engine=Engine(),
        fixed={},
    )
    curvature = Curvature(layers, sync, CONFIG)
    factor_a, factor_g = factors(torch.randn(16, 5, dtype=F64), torch.randn(16, 3, dtype=F64))
    count = CaptureCount(ranks=1, rows=16, replicates=2, squares={})
    means = GlobalMeans(True, 0, frozenset(), {"": count}, {A: factor_a, G: factor_g}, {}, [])

    curvature.refresh([A, G], means, lambda key: 0.0)

    gradient = torch.randn(1, 3, 5, dtype=F64)
    block = torch.kron(factor_g[0], factor_a[0]) + 0.1 * torch.eye(15, dtype=F64)
    expected = torch.linalg.solve(block, gradient.flatten()).view(1, 3, 5)
    torch.testing.assert_close(curvature.directions({"": gradient}, lambda _: None)[""], expected)


def test_a_phase_inside_another_is_not_counted_twice() -> None:
    stopwatch = Stopwatch()

    with stopwatch.phase("reduce"), stopwatch.phase("capture"):
        pass
    with stopwatch.phase("capture"):
        pass

    seconds = stopwatch.take()
    assert seconds.keys() == {"reduce", "capture"}
    assert stopwatch.take() == {}


def test_statistics_that_wait_for_the_step_are_a_part_of_its_reduction() -> None:
    """In a first step they all wait, since another pass might come; none of it is time of the backward pass."""
    model = nn.Linear(8, 4)
    optimizer = NGD(model)

    F.cross_entropy(model(torch.randn(16, 8)), torch.randint(4, (16,))).backward()
    optimizer.step()

    assert "reduce" in optimizer.stats.seconds
    assert "capture" not in optimizer.stats.seconds

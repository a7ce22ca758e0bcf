"""How near is each method's approximation to the Fisher block that it stands for?

Small networks in float64, at their first weights and after some steps of SGD. Of each layer the block is formed whole,
F = (1/N) sum over samples of the sample's gradient times itself: the empirical Fisher, which all methods can estimate.
So is the operator P that makes a method's directions, column by column; F~ = P^-1 - lambda I is what the method stands
for. The error is ||F - c F~|| / ||F|| with the best c, since some methods leave the scale to the rate; beside it stands
||F - F~|| / ||F||. The cosine is that of the method's direction and (F + lambda I)^-1 grad. lambda is a hundredth of
the mean eigenvalue of F, except where a method has a damping of its own.

    python -m benchmarks.approximations
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from benchmarks.models import digits
from benchmarks.record import folder_for, write
from ngd_dist import NGDConfig
from ngd_dist.config import PRECONDITIONERS
from ngd_dist.config.methods.base import is_ours
from ngd_dist.inversion import solve
from ngd_dist.layers import Layer, LayerBatch, Run, kind_of
from ngd_dist.preconditioners import Cache, Preconditioner, preconditioner_for

__all__ = ["NETWORKS", "measure", "rows_of", "table"]

DAMPING = 0.01  # of the mean eigenvalue
STEPS, LR = 60, 0.1
REFRESHES = 50
Row = dict[str, Any]


def mlp() -> nn.Module:
    """Returns 64-16-16-10 with ReLU, for 8x8 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))


def cnn() -> nn.Module:
    """Returns two convolutions of 3x3 and a linear layer, for 8x8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def measure(name: str, seed: int, samples: int = 512) -> Iterator[Row]:
    """Yields one row per method, layer and moment."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().double()
    x, y = digits(8)
    x, y = x[:samples].double(), y[:samples]
    for moment in ("first weights", f"after {STEPS} steps"):
        for layer, batch in rows_of(model, x, y):
            for kind in (kind for kind, choice in PRECONDITIONERS.items() if is_ours(choice)):
                yield {"network": name, "seed": seed, "moment": moment, "layer": layer.name, "method": kind} | quality(
                    kind, layer, batch
                )
        train(model, x, y)


def quality(kind: str, layer: Layer, batch: LayerBatch) -> Row:
    """Returns the errors and the cosine of one method on one layer."""
    gradients_NBOI = torch.einsum("bnpi,bnpo->nboi", batch.a_BNPI, batch.g_BNPO)
    gradients = gradients_NBOI.flatten(1)
    block = gradients.mT @ gradients / len(gradients)
    damping = DAMPING * float(block.diagonal().mean())
    identity = torch.eye(len(block), dtype=block.dtype)
    method = preconditioner_for(layer.shape, NGDConfig.model_validate({"preconditioner": PRECONDITIONERS[kind]()}))
    cache = cache_of(method, batch, damping)
    operator = torch.stack([method.apply(cache, e.view(layer.shape.gradient)).flatten() for e in identity], dim=1)
    implied = torch.linalg.inv(operator) - damping * identity
    scale = float((block * implied).sum() / implied.square().sum())
    gradient = gradients.mean(0)
    natural = torch.linalg.solve(block + damping * identity, gradient)
    return {
        "error": float((block - implied).norm() / block.norm()),
        "scaled_error": float((block - scale * implied).norm() / block.norm()),
        "cosine": float(F.cosine_similarity(operator @ gradient, natural, dim=0)),
    }


def cache_of(method: Preconditioner, batch: LayerBatch, damping: float) -> Cache:
    """Returns the method's cache from all of its statistics: what is measured in a basis comes second.

    Refreshed often, for a method whose refresh is one step towards the inverse.
    """
    statistics: dict[str, Tensor] = {}
    cache: Cache | None = None
    for in_basis in (False, True):
        due = frozenset(spec.name for spec in method.statistics if spec.in_basis is in_basis)
        if due:
            shared = {name: cache[name] for name in method.shared} if cache else {}
            statistics |= method.estimate(batch, due, shared)
            for _ in range(1 if in_basis else REFRESHES):
                solutions = solve(method.problems(statistics, due, damping, cache))
                cache = method.refresh(statistics, due, damping, cache, solutions).cache
                assert cache is not None
    assert cache is not None
    return cache


def rows_of(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[Layer, LayerBatch]]:
    """Returns each layer with its inputs and the gradients of each sample's own loss."""
    layers = [
        layer
        for name, module in model.named_modules()
        if (kind := kind_of(module)) is not None
        for layer in kind.split_module(name, module)
    ]
    runs: dict[str, tuple[Run, GradientEdge]] = {}

    def on_run(layer: Layer, inputs: Tensor, output: Tensor) -> None:
        kept = Run(layer.keep(inputs.detach(), output.detach()), len(x), slope=(output.detach() > 0).to(x))
        runs[layer.name] = kept, get_gradient_edge(output)

    handles = [handle for layer in layers for handle in layer.watch(partial(on_run, layer))]
    loss = F.cross_entropy(model(x), y, reduction="sum")
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [runs[layer.name][1] for layer in layers])
    found = []
    for layer, g in zip(layers, gradients, strict=True):
        run = runs[layer.name][0]
        is_last = layer is layers[-1]  # no activation reads its output
        arrived = Run(run.kept, run.samples, g=g, slope=None if is_last else run.slope)
        found.append((layer, LayerBatch(layer, [arrived], 1.0)))
    return found


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for _ in range(STEPS):
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()


def table(rows: list[Row]) -> str:
    """Returns the means over layers, networks and seeds in Markdown, by method and moment."""
    lines = ["# Approximations of the Fisher block", "", (__doc__ or "").split("\n\n    ")[0], ""]
    for moment in dict.fromkeys(row["moment"] for row in rows):
        lines += [f"## {moment[0].upper()}{moment[1:]}", ""]
        lines += ["| method | error, best scale | error | cosine to the exact direction | worst layer's cosine |"]
        lines += ["|---" * 5 + "|"]
        of_moment = [row for row in rows if row["moment"] == moment]
        for method in dict.fromkeys(row["method"] for row in of_moment):
            lines.append(_line(method, [row for row in of_moment if row["method"] == method]))
        lines.append("")
    return "\n".join(lines)


def _line(method: str, rows: list[Row]) -> str:
    def mean(what: str) -> float:
        return sum(row[what] for row in rows) / len(rows)

    cells = [f"{mean('scaled_error'):.3f}", f"{mean('error'):.3g}", f"{mean('cosine'):.3f}"]
    return f"| {method} | {' | '.join(cells)} | {min(row['cosine'] for row in rows):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu2", help="last word in the name of the result's folder")
    arguments = parser.parse_args()
    rows = [row for name in NETWORKS for seed in range(3) for row in measure(name, seed)]
    text = table(rows)
    write(folder_for("approximations", arguments.hardware), {"rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()

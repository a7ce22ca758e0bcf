"""Runs one module as a capture does, and puts gradients together from the rows that come of it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ngd_dist.layers import Layer, LayerBatch, Run, kind_of

Call = Callable[[], Tensor]


def layers_of(module: nn.Module, name: str = "layer", batch_dim: int = 0) -> list[Layer]:
    """Returns the layers that cover the module."""
    kind = kind_of(module)
    assert kind is not None
    return kind.split_module(name, module, batch_dim=batch_dim)


def watched(layers: list[Layer], call: Call, samples: int) -> tuple[Tensor, dict[str, Callable[[Tensor], LayerBatch]]]:
    """Returns what the call returns, and for each layer a function from the gradient of that to the layer's rows."""
    runs: dict[str, list[tuple[Run, GradientEdge]]] = {layer.name: [] for layer in layers}

    def on_run(layer: Layer, x: Tensor, output: Tensor) -> None:
        assert layer.expected_input(x) is None
        with torch.no_grad():
            run = Run(layer.keep(x.detach(), output.detach()), samples)
        # The output itself may be overwritten by what follows.
        runs[layer.name].append((run, get_gradient_edge(output)))

    handles = [handle for layer in layers for handle in layer.watch(partial(on_run, layer))]
    result = call()
    for handle in handles:
        handle.remove()

    def rows(layer: Layer, gradient: Tensor) -> LayerBatch:
        edges = [edge for _, edge in runs[layer.name]]
        gs = torch.autograd.grad(result, edges, gradient, retain_graph=True)
        with torch.no_grad():
            arrived = [Run(run.kept, run.samples, g=g) for (run, _), g in zip(runs[layer.name], gs, strict=True)]
        return LayerBatch(layer, arrived, 1.0)

    return result, {layer.name: partial(rows, layer) for layer in layers}


def sample_gradients(layer: Layer, rows: LayerBatch) -> Tensor:
    """Returns grad_NBOI: the sum over positions of each sample's rows."""
    a_BNPI, g_BNPO = rows.a_BNPI, rows.g_BNPO
    if layer.shape.fisher == "unit_wise":
        columns = [(a_BNPI * g_BNPO).sum(2), g_BNPO.sum(2)][: layer.shape.inputs]
        return torch.stack(columns, dim=-1).movedim(1, 0)
    if layer.shape.has_one_hot_inputs:
        a_BNPI = F.one_hot(a_BNPI[..., 0], layer.shape.inputs).to(g_BNPO.dtype)
    return torch.einsum("bnpi,bnpo->nboi", a_BNPI, g_BNPO)


def autograd_sample_gradients(layer: Layer, output: Tensor, gradient: Tensor, batch_dim: int = 0) -> Tensor:
    """Returns grad_NBOI by one backward pass per sample, from the part of the gradient that is the sample's."""
    found = []
    for n in range(output.shape[batch_dim]):
        own = torch.zeros_like(gradient)
        own.select(batch_dim, n).copy_(gradient.select(batch_dim, n))
        found.append(layer.join(torch.autograd.grad(output, layer.parameters, own, retain_graph=True)))
    return torch.stack(found)

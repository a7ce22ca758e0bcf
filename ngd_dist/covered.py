"""One record per covered layer: its module's tensors, its preconditioner, its settings, and its layout on the wire.

Layers that are alike make a `Stack`, which one call handles: a tiny layer costs as much as its calls.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.config import NGDConfig
from ngd_dist.distributed import LayerLayout
from ngd_dist.distributed.placement import Roles
from ngd_dist.inversion import Problem
from ngd_dist.layers import Layer
from ngd_dist.preconditioners import Cache, Preconditioner
from ngd_dist.statistics.statistic import Key

__all__ = ["CoveredLayer", "CoveredLayers", "Stack", "kind_of", "layers_with_few_rows", "stacks_of"]

# The arguments of `Preconditioner.problems`: statistics, the names of those that are new, the damping, the old cache.
RefreshInputs = tuple[dict[str, Tensor], frozenset[str], float, Cache | None]

# The most numbers in the cache of a layer that is stacked with others: beyond them the copies that stacking makes cost
# more than the calls that it saves.
MAX_STACKED = 2**14


@dataclass(eq=False, slots=True)
class CoveredLayer:
    """A layer that is preconditioned.

    group: the param group of the layer's weight. Its lr and damping may change between steps, and another dictionary
    may take its place in the optimizer, as after `load_state_dict`: each step begins by looking it up.
    """

    layer: Layer
    method: Preconditioner
    group: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the module in the model."""
        return self.layer.name

    @property
    def lr(self) -> float:
        """The learning rate of the layer's param group at this moment."""
        return float(self.group["lr"])

    @property
    def damping(self) -> float:
        """The damping of the layer's param group at this moment."""
        return float(self.group["damping"])

    @property
    def layout(self) -> LayerLayout:
        """The tensors of the layer that may travel between ranks."""
        method, layer = self.method, self.layer
        return LayerLayout(layer.shape.gradient, method.statistics, method.entries, layer.dtype, method.shared)


CoveredLayers = Mapping[str, CoveredLayer]
"""By name, in the order in which the model registers them."""


@dataclass(eq=False, slots=True)
class Stack:
    """Layers that are alike, small, and held by the same ranks: to join, precondition and split them takes one call.

    Most layers are alone in theirs. `first`: one of them. Tensors of several layers are stacked in front, [L, B, O, I],
    or their blocks are put side by side, [L B, O, I]. All ranks that hold a layer stack it with the same others, so
    that they round alike.
    """

    layers: list[CoveredLayer]
    parameters: list[list[nn.Parameter]] = field(init=False)  # all weights, then all biases

    def __post_init__(self) -> None:
        self.parameters = [list(alike) for alike in zip(*(c.layer.parameters for c in self.layers), strict=True)]

    @property
    def first(self) -> CoveredLayer:
        return self.layers[0]

    def join(self, read: Callable[[Sequence[nn.Parameter]], list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields each layer's name and grad_BOI. read: returns the gradients of parameters."""
        if len(self.layers) == 1:
            return iter([(self.first.name, self.first.layer.join(read(self.first.layer.parameters)))])
        joined_LBOI = self.first.layer.join([torch.stack(read(alike)) for alike in self.parameters])
        return zip(self._names, joined_LBOI.unbind(), strict=True)

    def split(self, directions: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yields each parameter and its part of the directions [B, O, I] by layer, in the parameter's dtype."""
        if len(self.layers) == 1:
            of_one = self.first.layer.split(directions[self.first.name])
            return ((p, part.to(p.dtype)) for p, part in zip(self.first.layer.parameters, of_one, strict=True))
        parts = self.first.layer.split(torch.stack([directions[name] for name in self._names]))
        alike = (
            (parameters, part.to(parameters[0].dtype)) for parameters, part in zip(self.parameters, parts, strict=True)
        )
        return (pair for parameters, part in alike for pair in zip(parameters, part.unbind(), strict=True))

    def apply(
        self, caches: Mapping[str, Cache | None], gradients: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and direction, [B, O, I], of each of its layers that has a gradient here.

        If the layer has no cache yet, that is the gradient itself.
        """
        waiting: dict[str, Cache] = {}
        dtype = self.first.layer.dtype
        for name in filter(gradients.__contains__, self._names):
            cache = caches[name]
            if cache is None:
                yield name, gradients[name].to(dtype)
            else:
                waiting[name] = cache
        if waiting:
            grad_BOI = _side_by_side([gradients[name] for name in waiting]).to(dtype)
            directions = self.first.method.apply(_by_name([*waiting.values()]), grad_BOI)
            yield from zip(waiting, directions.chunk(len(waiting)), strict=True)

    def problems(self, inputs: Mapping[str, RefreshInputs]) -> Iterator[tuple[Key, Problem]]:
        """Yields the inversions and decompositions that refreshing these of its layers needs."""
        alike: dict[Hashable, list[str]] = defaultdict(list)
        for name in filter(inputs.__contains__, self._names):
            statistics, fresh, damping, old = inputs[name]
            alike[*statistics, frozenset(fresh), damping, old is None].append(name)
        for names in alike.values():
            statistics, fresh, damping, old = inputs[names[0]]
            if len(names) > 1:
                statistics = _by_name([inputs[name][0] for name in names])
                olds = [cache for name in names if (cache := inputs[name][-1]) is not None]
                old = _by_name(olds) if olds else None
            for statistic, problem in self.first.method.problems(statistics, fresh, damping, old).items():
                yield from zip((Key(name, statistic) for name in names), problem.parts(len(names)), strict=True)

    @property
    def _names(self) -> list[str]:
        return [covered.name for covered in self.layers]


def stacks_of(layers: CoveredLayers, roles: Mapping[str, Roles]) -> list[Stack]:
    """Returns the stacks of the layers, in the order of their first ones."""
    alike: dict[Hashable, list[CoveredLayer]] = defaultdict(list)
    for name, covered in layers.items():
        kind, role = kind_of(covered), roles[name]
        ranks = (frozenset(role.inverters), frozenset(role.holders))
        alike[name if kind is None else (kind, ranks)].append(covered)
    return [Stack(of_kind) for of_kind in alike.values()]


def kind_of(covered: CoveredLayer) -> Hashable | None:
    """Returns the key that layers have in common if they are alike; None for a layer that is not stacked."""
    layer, method = covered.layer, covered.method
    if not (layer.is_stackable and method.is_blockwise):
        return None
    if sum(form.numbers for form in method.entries.values()) > MAX_STACKED:
        return None
    tensors = tuple((s, p.dtype, p.device) for s, p in zip(layer.shapes, layer.parameters, strict=True))
    return type(layer), type(method), layer.batch_dim, replace(layer.shape, name=""), tensors


def layers_with_few_rows(layers: CoveredLayers, config: NGDConfig, world_size: int) -> frozenset[str]:
    """Returns the layers of which the few rows of a step may stand for a dense factor.

    They are not among those that may be stacked: so small a factor is whole, since the rows of one layer could not be
    put beside the matrix of another.
    """
    may_keep = config.may_keep_rows and world_size == 1
    return frozenset(name for name, covered in layers.items() if may_keep and kind_of(covered) is None)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


def _by_name(of_layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _side_by_side([tensors[name] for tensors in of_layers]) for name in of_layers[0]}

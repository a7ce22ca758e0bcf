"""The local Fisher layer: a fixed matrix G^-1/2 between a trained weight W' and the weight W that the layer uses.

Shapes: B blocks (groups of a convolution), I inputs of a block: channels times kernel positions.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ngd_dist.inversion.square_roots import Roots
from ngd_dist.layers import Layer
from ngd_dist.layers.hooks import is_transformed, remove, weakly

__all__ = ["LocalFisher", "ReconstructedLayer", "times"]


def times(weight: Tensor, matrix_BII: Tensor) -> Tensor:
    """Returns weight matrix for a weight [O, ...], whose rows of each block have the block's matrix on their right."""
    blocks, inputs, _ = matrix_BII.shape
    # Under autocast the product would be of 16 bits, and its error that of the inverse root's largest entries.
    with torch.autocast(weight.device.type, enabled=False):
        return (weight.reshape(blocks, -1, inputs) @ matrix_BII).reshape(weight.shape)


class LocalFisher(nn.Module):
    """Computes W = W' G^-1/2; torch's `parametrize` calls it wherever the layer reads its weight.

    The roots are no buffers: engines send buffers around in each pass, and a state dict has the weight alone.
    """

    def __init__(self, blocks: int, inputs: int, weight: Tensor) -> None:
        super().__init__()
        eye = torch.eye(inputs, dtype=weight.dtype, device=weight.device).expand(blocks, -1, -1)
        self.roots = Roots(eye.clone(), eye.clone())

    def forward(self, trained: Tensor) -> Tensor:
        return times(trained, self.roots.inverse)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Returns W' of a weight that is assigned to the layer."""
        return times(weight, self.roots.root)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.roots = Roots(*map(fn, self.roots))
        return self


class ReconstructedLayer:
    """A linear or convolution layer that trains W', and the second moment of its inputs.

    moment_BII: E[x xᵀ] in use; None before the first refresh. The bias stays as it is.
    """

    def __init__(self, layer: Layer) -> None:
        self.name, self.module = layer.name, layer.module
        self._layer = layer
        self._outputs = layer.shape.outputs * layer.shape.blocks
        weight = layer.module.weight
        assert isinstance(weight, nn.Parameter)
        self.trained = weight
        self._inputs = weight[0].numel()
        self.fisher = LocalFisher(layer.shape.blocks, self._inputs, weight)
        self.moment_BII: Tensor | None = None
        self.is_measured = True
        self._begin()
        parametrize.register_parametrization(layer.module, "weight", self.fisher)
        self._handles = layer.watch(weakly(self._on_run))

    @property
    def weight(self) -> Tensor:
        """W, in plain coordinates."""
        weight: Tensor = self.fisher(self.trained.detach())
        return weight

    def take_sums(self) -> tuple[Tensor, int]:
        """Returns the sum of x xᵀ over the rows since the last call, [B, I, I], and the number of rows."""
        sums = self._sum_BII, self._count
        self._begin()
        return sums

    def move(self, roots: Roots) -> Tensor:
        """Goes over to new roots with the same W. Returns the matrix that takes a gradient or a momentum along.

        A gradient of W' is that of W times G^-1/2, and its new coordinates are those with the new inverse root.
        """
        old, exact = self.fisher.roots, Roots(*(root.double() for root in roots))
        weight = times(self.trained.double(), old.inverse.double())
        self.trained.copy_(times(weight, exact.root))
        self.fisher.roots = Roots(*(root.to(self.trained.dtype) for root in roots))
        return old.root.double() @ exact.inverse

    def fold(self) -> Tensor:
        """Gives the module its plain weight. Returns the matrix that takes a gradient or a momentum along."""
        remove(self._handles)
        parametrize.remove_parametrizations(self.module, "weight")
        return self.fisher.roots.root.double()

    def state_dict(self) -> dict[str, Any]:
        roots = self.fisher.roots
        return {
            "trained": self.trained.detach(),
            "root": roots.root,
            "inverse_root": roots.inverse,
            "moment": self.moment_BII,
        }

    def problem(self, state: Mapping[str, Any]) -> str | None:
        """Returns the reason why a state can't be this layer's; None: it can."""
        root = self.fisher.roots.root
        shapes = {"trained": self.trained.shape} | dict.fromkeys(("root", "inverse_root", "moment"), root.shape)
        for key, shape in shapes.items():
            given = state.get(key)
            if isinstance(given, Tensor) and given.shape != shape:
                return f"{key} must be a tensor {list(shape)}, got {list(given.shape)}"
            if given is None and key != "moment":  # there is none before the first refresh
                return f"it has no {key}"
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.trained.copy_(state["trained"])
        own = self.fisher.roots.root
        self.fisher.roots = Roots(*(state[key].to(own, copy=True) for key in ("root", "inverse_root")))
        self.moment_BII = None if state["moment"] is None else state["moment"].to(own, copy=True)

    def _begin(self) -> None:
        self._sum_BII: Tensor = torch.zeros_like(self.fisher.roots.root, dtype=self._layer.dtype)
        self._count = 0

    def _on_run(self, x: Tensor, output: Tensor) -> None:
        is_training = self.module.training and torch.is_grad_enabled() and not is_transformed()
        if not (self.is_measured and is_training) or self._layer.expected_input(x) is not None:
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            moment_BII = self._layer.input_moment(self._layer.keep(x, output))
            self._sum_BII += moment_BII[:, : self._inputs, : self._inputs]  # without the bias, the last input
        self._count += output.numel() // self._outputs

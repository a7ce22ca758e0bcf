"""SNGD: the model is reconstructed with local Fisher layers, and any plain optimizer takes natural gradient steps."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from ngd_dist.capture.coverage import cover
from ngd_dist.config import NGDConfig, SNGDConfig
from ngd_dist.distributed.comm import Communicator
from ngd_dist.engines import unwrap
from ngd_dist.errors import CheckpointError, ConfigError
from ngd_dist.inversion.square_roots import Roots, square_roots
from ngd_dist.layers import Conv, Linear
from ngd_dist.transforms.base import Transform
from ngd_dist.transforms.local_fisher import ReconstructedLayer, times

__all__ = ["SNGD"]

logger = logging.getLogger(__name__)

# State of optimizers by name: means of gradients, which go along, and means of squares, which have no other
# coordinates and stay as they are.
MEANS = frozenset({"momentum_buffer", "exp_avg"})
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq"})


class SNGD(Transform):
    """Structured natural gradient: y = W' (G^-1/2 x), where G = E[x xᵀ] + epsilon I of each layer's input x.

    G^-1/2 is fixed, and the optimizer trains W'. A gradient step on W' is a step of W along the gradient times G^-1. At
    every T-th step G is made of that step's inputs on all ranks; W' and the optimizer's momentum go over to the new
    coordinates, and the function of the model stays. Linear and convolution layers are reconstructed; other parameters
    are trained as they are, and so is the bias of a layer.

    Build it before the optimizer, and call `step` after each step of the optimizer. Passes in training mode with
    gradients count. process_group: the ranks that train the model. Raises: ConfigError for a model without such a
    layer, or one whose weights an engine has cut. Source: arXiv 2412.07441.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> sngd = SNGD(model, SNGDConfig(T=10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> for x, y in [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(3)]:
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    ...     sngd.step(optimizer)
    >>> sngd.fold()
    >>> model[0]
    Linear(in_features=8, out_features=16, bias=True)
    """

    def __init__(
        self, model: nn.Module, config: SNGDConfig | None = None, *, process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.config = config = SNGDConfig.model_validate(config or {})
        engine, self._model = unwrap(model)
        if engine.is_sharded or engine.steps_itself:
            raise ConfigError(
                f"SNGD multiplies whole weights by matrices, and {engine.averager} has parts of them; take an engine "
                "that leaves weights whole"
            )
        self._comm = Communicator(process_group)
        trained = {p for p in self._model.parameters() if p.requires_grad}
        covered, _ = cover(self._model, trained, NGDConfig(exclude=config.exclude))
        fitting = [layer for layer in covered if type(layer) in (Linear, Conv)]
        narrow = [layer for layer in fitting if layer.shapes[0][1:].numel() <= config.max_inputs]
        if not narrow:
            raise ConfigError(
                f"SNGD reconstructs linear and convolution layers of at most {config.max_inputs} inputs (max_inputs), "
                f"and the model has none to train: {len(fitting)} are wider; raise max_inputs, or take no SNGD"
            )
        self.layers = [ReconstructedLayer(layer) for layer in narrow]
        self.steps = 0

    @torch.no_grad()
    def step(self, *optimizers: optim.Optimizer) -> None:
        """Collective at every T-th step. Counts a step of the optimizers, and refreshes G if it is due.

        optimizers: those that train the model's weights; their momentum goes along. One that keeps other tensors of a
        weight than momentum and means of squares is refused. Raises: ConfigError, CollectiveError.
        """
        if self.steps % self.config.T == 0:
            self._refresh(optimizers)
        self.steps += 1
        for layer in self.layers:
            layer.is_measured = self.steps % self.config.T == 0

    def plain_state_dict(self) -> dict[str, Any]:
        """Returns the state dict of the plain model, under its own names.

        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> sorted(SNGD(model).plain_state_dict())
        ['0.bias', '0.weight']
        """
        content = dict(self._model.state_dict())
        for layer in self.layers:
            prefix = f"{layer.name}." if layer.name else ""
            del content[f"{prefix}parametrizations.weight.original"]
            content[f"{prefix}weight"] = layer.weight
        return content

    @torch.no_grad()
    def fold(self, *optimizers: optim.Optimizer) -> None:
        """Makes the layers plain again; the momentum of the optimizers goes along."""
        for layer in self.layers:
            _take_along(optimizers, layer, layer.fold())
        self.layers = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the trained weights, the roots and the moments by layer, and the number of steps."""
        return {"steps": self.steps, "layers": {layer.name: layer.state_dict() for layer in self.layers}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state, at any number of ranks. Raises: CheckpointError, with nothing changed, if it is unfit.

        >>> model, other = nn.Linear(8, 4), nn.Linear(8, 4)
        >>> sngd = SNGD(other)
        >>> sngd.load_state_dict(SNGD(model).state_dict())
        >>> torch.equal(other.weight, model.weight)
        True
        """
        saved, here = state_dict["layers"], {layer.name for layer in self.layers}
        if saved.keys() != here:
            differing = ", ".join(sorted(saved.keys() ^ here))
            raise CheckpointError(
                f"the state is of other layers than the model's: {differing}; build SNGD on the model and with the "
                "exclude and max_inputs that the state was saved with"
            )
        for layer in self.layers:
            if problem := layer.problem(saved[layer.name]):
                raise CheckpointError(f"the state of layer {layer.name!r} doesn't fit: {problem}")
        self.steps = int(state_dict["steps"])
        for layer in self.layers:
            layer.load_state_dict(saved[layer.name])
            layer.take_sums()
            layer.is_measured = self.steps % self.config.T == 0

    def _refresh(self, optimizers: tuple[optim.Optimizer, ...]) -> None:
        """Collective. Goes over to the roots of the inputs that all ranks have seen in this step."""
        for optimizer in optimizers:
            for layer in self.layers:
                _check_state(optimizer, layer)
        for layer, moment_BII in self._measured():
            decay, old = self.config.ema_decay, layer.moment_BII
            mean_BII = moment_BII if old is None else decay * old + (1 - decay) * moment_BII
            roots = self._roots(layer, mean_BII)
            if not all(root.isfinite().all() for root in roots):
                logger.warning("layer %s keeps its coordinates: G has no square root", layer.name)
                continue
            layer.moment_BII = mean_BII
            _take_along(optimizers, layer, layer.move(roots))

    def _measured(self) -> Iterator[tuple[ReconstructedLayer, Tensor]]:
        """Collective. Yields each layer that has run on some rank, and the mean of x xᵀ over all ranks' rows."""
        sums = [layer.take_sums() for layer in self.layers]
        counts = torch.tensor([count for _, count in sums], dtype=torch.float64, device=sums[0][0].device)
        self._comm.all_reduce("rows of reconstructed layers", counts)
        for layer, (sum_BII, _), count in zip(self.layers, sums, counts.tolist(), strict=True):
            if count:
                self._comm.all_reduce(f"inputs of {layer.name}", sum_BII, kind="statistics")
                yield layer, sum_BII / count

    def _roots(self, layer: ReconstructedLayer, mean_BII: Tensor) -> Roots:
        """Collective. Returns the roots of G. One rank computes them: two processors might differ by a rounding."""
        owner = self.layers.index(layer) % self._comm.world_size
        G = mean_BII.to(torch.float64 if self.config.root == "eigh" else mean_BII.dtype, copy=True)
        G.diagonal(dim1=1, dim2=2).add_(self.config.epsilon)
        is_mine = self._comm.rank == owner
        roots = square_roots(G, self.config.root) if is_mine else Roots(torch.empty_like(G), torch.empty_like(G))
        for name, root in zip(Roots._fields, roots, strict=True):
            self._comm.broadcast(f"{name} of {layer.name}", root, src=owner)
        return roots


def _check_state(optimizer: optim.Optimizer, layer: ReconstructedLayer) -> None:
    """Raises: ConfigError if the optimizer keeps something of a weight that has no meaning in other coordinates."""
    for key, value in optimizer.state.get(layer.trained, {}).items():
        is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)
        if not is_number and value is not None and key not in MEANS | SQUARES:
            raise ConfigError(
                f"SNGD can't take {key!r} of {type(optimizer).__name__} to other coordinates: take an optimizer that "
                "keeps momentum and means of squares alone, such as SGD or AdamW"
            )


def _take_along(optimizers: tuple[optim.Optimizer, ...], layer: ReconstructedLayer, matrix_BII: Tensor) -> None:
    """Multiplies the means of gradients that the optimizers keep of a layer's weight by the matrix."""
    for optimizer in optimizers:
        for key, value in optimizer.state.get(layer.trained, {}).items():
            if key in MEANS and isinstance(value, Tensor):
                value.copy_(times(value.double(), matrix_BII))

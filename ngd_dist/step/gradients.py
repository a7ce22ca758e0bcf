"""This rank's gradients or pieces of them, without a GradScaler's factor, and the check that all are finite."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.capture.loss_scale import LossScale
from ngd_dist.distributed.comm import Communicator
from ngd_dist.engines import Engine, Piece
from ngd_dist.errors import NonFiniteError
from ngd_dist.step.finite import all_finite, are_finite

__all__ = ["Gradients"]


class Gradients:
    """Reads the gradients of parameters, given by name: each in its `grad` or, if the engine shards, a piece of it.

    pieces: those of this rank, of an engine that shards, since the last `begin`.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], loss_scale: LossScale, comm: Communicator, engine: Engine
    ) -> None:
        self._parameters = parameters
        self._all = frozenset(parameters.values())
        self._loss_scale = loss_scale
        self._comm = comm
        self._engine = engine
        self.pieces: Mapping[nn.Parameter, Piece] = {}
        self.begin()
        # A rank has gradients of these alone.
        self._here = {name: p for name, p in parameters.items() if not engine.is_sharded or p in self.pieces}

    def begin(self) -> None:
        """Looks up the pieces of this step, once all gradients have come."""
        if self._engine.is_sharded:
            self.pieces = self._engine.pieces(self._parameters.values())

    def forget(self) -> None:
        """Lets go of the gradients, so that `zero_grad` frees them; where the pieces lie stays known."""
        self.pieces = {p: piece._replace(gradient=None) for p, piece in self.pieces.items()}

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Returns the tensor that an update moves: the parameter, or this rank's piece of it."""
        return self.pieces[parameter].weight if self._engine.is_sharded else parameter

    def read(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns the gradient as it is, or this rank's piece of it; None if there is none."""
        if not self._engine.is_sharded:
            return parameter.grad
        piece = self.pieces.get(parameter)
        return None if piece is None else piece.gradient

    def of(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Returns the gradients of the loss; zeros for a parameter that has none, and nothing, [0], for no piece."""
        if self._engine.is_sharded:
            return [self._piece(p) for p in parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return self._loss_scale.unscaled(optimizer, gradients)

    def flags(self, optimizer: Any, device: torch.device) -> Tensor:
        """Returns, without reading it, [2]: 1 if a gradient has NaN or infinity; the number of missing ones."""
        gradients = [gradient for p in self._here.values() if (gradient := self.read(p)) is not None]
        overflow = self._loss_scale.overflow(optimizer)
        if overflow is not None:
            bad = overflow.to(device, torch.float32).sign().view(1)
        else:
            bad = (~all_finite(gradients)).float().view(1) if gradients else torch.zeros(1, device=device)
        return torch.cat([bad, bad.new_full((1,), len(self._here) - len(gradients))])

    def differentiated(self, *, everywhere: bool) -> Collection[nn.Parameter]:
        """Returns the parameters that have a gradient on any rank; collective unless all have one `everywhere`."""
        parameters = self._parameters.values()
        if everywhere:
            return self._all
        flags = [self.read(p) is not None for p in parameters]
        is_same = self._engine.averages_gradients and not self._engine.is_sharded
        if self._comm.world_size > 1 and not is_same:
            counts = torch.tensor(flags, dtype=torch.float32, device=next(iter(parameters)).device)
            self._comm.all_reduce("which parameters have a gradient", counts, kind="gradients")
            flags = (counts > 0).tolist()
        return {p for p, has_gradient in zip(parameters, flags, strict=True) if has_gradient}

    def error(self, step: int) -> NonFiniteError:
        """Collective. Returns the same error on every rank: it names the first bad parameter of the first bad rank."""
        gradients = {name: gradient for name, p in self._here.items() if (gradient := self.read(p)) is not None}
        finite = zip(gradients, are_finite([*gradients.values()]), strict=True)
        bad = next((name for name, is_finite in finite if not is_finite), None)
        names = self._comm.all_gather_object("non-finite gradients", bad)
        rank, name = next((rank, name) for rank, name in enumerate(names) if name is not None)
        return NonFiniteError(
            f"the gradient of {name!r} is NaN or infinite on rank {rank} of {self._comm.world_size} in step {step}; "
            "no weight and no statistic was changed. Lower lr, raise damping, or set non_finite='skip' to go on with "
            "the next batch"
        )

    def _piece(self, parameter: nn.Parameter) -> Tensor:
        piece = self.pieces.get(parameter)
        if piece is None:
            return torch.zeros(0, device=parameter.device)
        return torch.zeros_like(piece.weight) if piece.gradient is None else piece.gradient

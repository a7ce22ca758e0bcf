"""This rank's gradients, without a GradScaler's factor, and the check that all are finite."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.capture.loss_scale import LossScale
from ngd_dist.distributed.comm import Communicator
from ngd_dist.errors import NonFiniteError
from ngd_dist.step.finite import all_finite, are_finite

__all__ = ["Gradients"]


class Gradients:
    """Reads the `grad` of parameters, given by name.

    is_averaged: whether an engine averages gradients over ranks, and so gives the same ones to all.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], loss_scale: LossScale, comm: Communicator, *, is_averaged: bool
    ) -> None:
        self._parameters = parameters
        self._all = frozenset(parameters.values())
        self._loss_scale = loss_scale
        self._comm = comm
        self._is_averaged = is_averaged

    def of(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Returns the gradients of the loss; zeros for a parameter that has none."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return self._loss_scale.unscaled(optimizer, gradients)

    def flags(self, optimizer: Any, device: torch.device) -> Tensor:
        """Returns, without reading it, [2]: 1 if a gradient has NaN or infinity; the number of missing ones."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        overflow = self._loss_scale.overflow(optimizer)
        if overflow is not None:
            bad = overflow.to(device, torch.float32).sign().view(1)
        else:
            bad = (~all_finite(gradients)).float().view(1) if gradients else torch.zeros(1, device=device)
        return torch.cat([bad, bad.new_full((1,), len(self._parameters) - len(gradients))])

    def differentiated(self, *, everywhere: bool) -> Collection[nn.Parameter]:
        """Returns the parameters that have a gradient on any rank; collective unless all have one `everywhere`."""
        parameters = self._parameters.values()
        if everywhere:
            return self._all
        flags = [p.grad is not None for p in parameters]
        if self._comm.world_size > 1 and not self._is_averaged:
            counts = torch.tensor(flags, dtype=torch.float32, device=next(iter(parameters)).device)
            self._comm.all_reduce("which parameters have a gradient", counts, kind="gradients")
            flags = (counts > 0).tolist()
        return {p for p, has_gradient in zip(parameters, flags, strict=True) if has_gradient}

    def error(self, step: int) -> NonFiniteError:
        """Collective. Returns the same error on every rank: it names the first bad parameter of the first bad rank."""
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        finite = zip(gradients, are_finite([*gradients.values()]), strict=True)
        bad = next((name for name, is_finite in finite if not is_finite), None)
        names = self._comm.all_gather_object("non-finite gradients", bad)
        rank, name = next((rank, name) for rank, name in enumerate(names) if name is not None)
        return NonFiniteError(
            f"the gradient of {name!r} is NaN or infinite on rank {rank} of {self._comm.world_size} in step {step}; "
            "no weight and no statistic was changed. Lower lr, raise damping, or set non_finite='skip' to go on with "
            "the next batch"
        )

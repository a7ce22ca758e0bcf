"""torch's fully_shard (FSDP2): each rank has a range of the rows of every parameter, and of its mean gradient."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ngd_dist.config import NGDConfig
from ngd_dist.config.pieces import refusal_of_pieces
from ngd_dist.engines.engine import Engine, Piece
from ngd_dist.errors import ConfigError

__all__ = ["FSDP2"]


class FSDP2(Engine):
    """A model after `fully_shard(model)`, over one mesh dimension that is the optimizer's process group.

    It has no wrapper: modules get another class, and their parameters are DTensors outside of their forward and
    backward passes.
    """

    averages_gradients = True
    averager = "fully_shard"
    is_sharded = True
    keeps_gradients = False
    swaps_parameters = True

    def drives(self, model: nn.Module) -> bool:
        kind = _fsdp_module()
        return kind is not None and any(isinstance(module, kind) for module in model.modules())

    def bound(self, model: nn.Module) -> Engine:
        for name, p in model.named_parameters():
            if not _is_dtensor(p):
                raise ConfigError(
                    f"fully_shard has not sharded {name!r}: call fully_shard on the whole model too, after its parts, "
                    "and build the optimizer before the first forward pass, while all parameters are sharded"
                )
            placements, mesh = p.placements, p.device_mesh  # type: ignore[attr-defined]
            if mesh.ndim != 1 or not placements[0].is_shard(0):
                raise ConfigError(
                    f"{name!r} is placed as {tuple(placements)} on a mesh of {mesh.ndim} dimensions, and NGD supports "
                    "Shard(0) on one: tensor parallel and hybrid sharded models are not supported"
                )
            if p.device.type != mesh.device_type:
                raise ConfigError(
                    f"{name!r} is on {p.device.type}, and its mesh on {mesh.device_type}: offload is not supported"
                )
        return self

    def owned(self, parameter: nn.Parameter) -> str | None:
        if not _is_dtensor(parameter):
            return None
        return "it is a DTensor that no fully_shard has made: tensor parallel models are not supported"

    def class_of(self, module: nn.Module) -> type[nn.Module] | None:
        kind = _fsdp_module()
        if kind is None or not isinstance(module, kind):
            return None
        order = type(module).__mro__
        return order[order.index(kind) + 1]

    def fitted(self, config: NGDConfig) -> NGDConfig:
        if (problem := refusal_of_pieces(config, self.averager)) is not None:
            raise ConfigError(problem)
        return config

    def check_ranks(self, model: nn.Module, rank: int, world_size: int) -> None:
        for name, p in model.named_parameters():
            mesh: Any = p.device_mesh  # type: ignore[attr-defined]
            if (mesh.get_local_rank(), mesh.size()) != (rank, world_size):
                raise ConfigError(
                    f"{name!r} is sharded over {mesh.size()} ranks, of which this is {mesh.get_local_rank()}, and the "
                    f"process group has {world_size}, of which this is {rank}: give both the same ranks in one order"
                )

    def check_unfrozen(self, count: int) -> None:
        raise ConfigError(
            f"{count} parameters were unfrozen after fully_shard: unfreeze them before it, and build a new optimizer"
        )

    def check_foreign(self, count: int) -> None:
        raise ConfigError(
            f"fully_shard averages its model's gradients alone: {count} in param_groups are not of the model"
        )

    @torch.no_grad()
    def pieces(self, parameters: Iterable[nn.Parameter]) -> Mapping[nn.Parameter, Piece]:
        pieces = {}
        for p in parameters:
            local, mesh = p.to_local(), p.device_mesh  # type: ignore[attr-defined]
            if local.numel():
                rows_of_a_rank = -(-p.shape[0] // mesh.size())
                start = mesh.get_local_rank() * rows_of_a_rank * (p.numel() // p.shape[0])
                gradient = None if p.grad is None else p.grad.to_local().view(-1)  # type: ignore[attr-defined]
                pieces[p] = Piece(start, gradient, local.view(-1))
        return pieces


def _fsdp_module() -> type[nn.Module] | None:
    """Returns the class that fully_shard puts before a module's own; None if it was not imported, which takes 3 s."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _is_dtensor(p: nn.Parameter) -> bool:
    return type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor"

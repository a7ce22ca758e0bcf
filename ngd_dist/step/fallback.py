"""Updates the parameters that no preconditioned layer covers, if the config names an optimizer for them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.config import AdamWFallback
from ngd_dist.errors import CheckpointError

__all__ = ["Fallback", "lr_ratio"]


class Fallback:
    """torch.optim.AdamW over the plain parameters; a group's lr follows that of NGD's group.

    groups: NGD's param groups.
    names: the plain parameters, each with a unique name, under which its state is saved. May be empty.
    pieces: this rank's piece of each of them that it has one of, [length], if an engine shards; AdamW then moves those.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[nn.Parameter, str],
        config: AdamWFallback,
        pieces: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        moved = {p: p for p in names} if pieces is None else {p: nn.Parameter(pieces[p]) for p in names if p in pieces}
        self._moved = moved
        self._names = {moved[p]: name for p, name in names.items() if p in moved}
        self._has_pieces = pieces is not None
        self._lr = config.lr
        self._adamw = torch.optim.AdamW(
            [{"params": [moved[p] for p in group["params"] if p in moved]} for group in groups],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        gradients: Mapping[nn.Parameter, Tensor],
        weight: Callable[[nn.Parameter], Tensor] | None = None,
    ) -> None:
        """Moves these parameters by AdamW's rule, at config.lr * lr / first_lr; leaves each `grad` as it was.

        groups: NGD's present param groups, since an optimizer's `load_state_dict` replaces them.
        gradients: the mean over all ranks, of every plain parameter that has one. weight: returns this step's piece of
            a parameter, if there are pieces.
        """
        for ours, group in zip(self._adamw.param_groups, groups, strict=True):
            ours["lr"] = self._lr * lr_ratio(group)
        before = {p: p.grad for p in self._names}
        try:
            for p, moved in self._moved.items():
                if self._has_pieces and weight is not None:
                    moved.data = weight(p)
                moved.grad = gradients[p].to(moved) if p in gradients else None
            self._adamw.step()
        finally:
            for p, gradient in before.items():
                p.grad = gradient

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns AdamW's state by parameter name, empty before the first step. The tensors are in use, as torch's.

        A parameter that has had no gradient yet has an empty state.
        """
        return {name: dict(self._adamw.state.get(p, {})) for p, name in self._names.items() if self._adamw.state}

    def inherit(self, old: "Fallback") -> None:
        """Takes over the state of the parameters that both update."""
        self._adamw.state.update({p: state for p, state in old._adamw.state.items() if p in self._names})

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over a copy of a saved state. Raises: CheckpointError if it is of other parameters."""
        expected = set(self._names.values())
        if saved and saved.keys() != expected:
            raise CheckpointError(
                "the fallback's state is of another model: "
                f"missing {sorted(expected - saved.keys())}, unknown {sorted(saved.keys() - expected)}"
            )
        loaded = {p: _state_for(p, name, saved[name]) for p, name in self._names.items() if saved.get(name)}
        self._adamw.state.clear()
        for p, state in loaded.items():
            self._adamw.state[p] = state


def lr_ratio(group: Mapping[str, Any]) -> float:
    """Returns lr / first_lr. If a group began at 0, which gives no scale, 1 once its lr is above 0."""
    lr, first = group["lr"], group["first_lr"]
    return float(lr / first if first > 0 else lr > 0)


def _state_for(parameter: nn.Parameter, name: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for moment in ("exp_avg", "exp_avg_sq"):
        if saved[moment].shape != parameter.shape:
            raise CheckpointError(
                f"the fallback's state is of another model: {moment} of {name!r} must be of shape "
                f"{tuple(parameter.shape)}, got {tuple(saved[moment].shape)}"
            )
    # AdamW keeps its count of steps on the CPU in float32, where reading it does not wait for the device.
    return {
        key: value.to("cpu", copy=True) if key == "step" else value.to(parameter, copy=True)
        for key, value in saved.items()
    }

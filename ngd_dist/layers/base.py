"""The contract of a module kind.

Shapes: B blocks, N samples, P positions (1 when dense), I inputs (+1 with bias), O outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ngd_dist.factors.cost import LayerShape
from ngd_dist.factors.kronecker import second_moment
from ngd_dist.layers.hooks import ModuleHook
from ngd_dist.layers.run import of_samples

__all__ = ["Layer", "Listener", "OnRun", "awaits"]

# Called in forward, for every run of the layer, with its input and its output.
OnRun = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Listener:
    """An `OnRun` that can tell before a run whether it will note that, for layers that have to prepare the output."""

    on_run: OnRun
    awaits: Callable[[], bool | None]

    def __call__(self, x: Tensor, output: Tensor) -> None:
        self.on_run(x, output)


def awaits(on_run: OnRun) -> bool:
    """Returns whether a run that begins now may be noted: unless the function tells, it may."""
    return bool(on_run.awaits()) if isinstance(on_run, Listener) else True


class Layer(ABC):
    """One covered part of a module: it has the parameters and the shape, and turns the tensors into rows.

    `batch_dim` is the dimension of the input and the output that counts samples: 0, or 1 if a sequence comes first.
    `is_stackable`: whether `join` and `split` also take tensors of several layers that are alike, stacked in front.
    """

    is_stackable: ClassVar[bool] = False

    def __init__(self, name: str, module: nn.Module, *, batch_dim: int = 0) -> None:
        self.name = name
        self.module = module
        self.batch_dim = batch_dim
        self.parameters: list[nn.Parameter] = self._own_parameters()
        # Frozen: an engine may empty parameters between passes.
        self.shapes: list[torch.Size] = [p.shape for p in self.parameters]
        # That in which statistics and directions are computed.
        self.dtype = torch.float64 if self.parameters[0].dtype == torch.float64 else torch.float32
        self._homes = [
            (owner, name, p)
            for owner in module.modules()
            for name, p in owner.named_parameters(recurse=False)
            if any(p is parameter for parameter in self.parameters)
        ]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Has `shape` of every kind read once, when its parameters have their whole shapes."""
        super().__init_subclass__(**kwargs)
        shape = vars(cls).get("shape")
        if isinstance(shape, property) and shape.fget is not None and not shape.__isabstractmethod__:
            frozen = cached_property(shape.fget)
            frozen.__set_name__(cls, "shape")
            cls.shape = frozen  # type: ignore[assignment]

    @classmethod
    def split_module(cls, name: str, module: nn.Module, *, batch_dim: int = 0) -> "list[Layer]":
        """Returns the layers that cover the module: one, for most kinds."""
        return [cls(name, module, batch_dim=batch_dim)]

    @classmethod
    def uncovered(cls, module: nn.Module) -> str | None:
        """Returns the reason why this kind can't cover the module, or None if it can."""
        return None

    def watch(self, on_run: OnRun) -> list[RemovableHandle]:
        """Returns the handles of hooks that call `on_run` at every run of the layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            # If the hook was removed while the module ran, torch no longer knows that it wants kwargs.
            if len(rest) == 2:
                kwargs, output = rest
                on_run(args[0] if args else next(iter(kwargs.values())), output)

        return [self.module.register_forward_hook(ModuleHook(hook), with_kwargs=True)]

    def replaced(self) -> list[str]:
        """Returns the names of the parameters that the module does not hold at present.

        `torch.func.functional_call` replaces them for a while; weight_norm, pruning and engines that shard parameters
        do so for good.
        """
        return [name for owner, name, p in self._homes if owner._parameters.get(name) is not p]

    def held(self) -> list[nn.Parameter]:
        """Returns the parameters that the module holds now; while it runs, an engine may put others in their place."""
        held = (owner._parameters.get(name) for owner, name, _ in self._homes)
        return [p for p in held if p is not None]

    @abstractmethod
    def expected_input(self, x: Tensor) -> str | None:
        """Returns the shape that the layer's input must have if x has another, else None."""

    @property
    @abstractmethod
    def shape(self) -> LayerShape:
        """The shape of the gradient, and the kind of Fisher block."""

    def keep(self, x: Tensor, output: Tensor) -> Any:
        """Returns the tensors of a run to keep until its gradient arrives. Called in forward, without gradient."""
        return x

    @abstractmethod
    def inputs(self, kept: Any) -> Tensor:
        """Returns a_BNPI in the statistics' dtype from the kept tensors, with N the length of `batch_dim`.

        One-hot rows are never made: the result is then the column of each 1, [B, N, P, 1] int64.
        """

    @abstractmethod
    def output_gradients(self, kept: Any, g: Tensor) -> Tensor:
        """Returns g_BNPO in the statistics' dtype from the kept tensors and g, of the shape of `on_run`'s output.

        Rows that have no part in the parameters' gradient are 0.
        """

    def positions(self, kept: Any, g_BNPO: Tensor) -> tuple[float, ...]:
        """Returns the positions of one run, a mean over N: one number for all blocks, or one for each.

        Rows that are 0 because they have no part in the gradient don't count.
        """
        return (g_BNPO.shape[2],)

    def rows(self, kept: Any, g: Tensor) -> int:
        """Returns N P of one run, padding included. g: of the shape of `on_run`'s output. Makes no rows."""
        return g.numel() // (self.shape.blocks * self.shape.outputs)

    def input_squares(self, a_BNPI: Tensor, counted_BNP: Tensor | None) -> Tensor:
        """Returns the sum over n and p of a^2, [B, I]: the diagonal of sum a a^T. `counted_BNP`: see `LayerBatch`."""
        return a_BNPI.square().sum((1, 2))

    def input_moment(self, kept: Any) -> Tensor:
        """Returns the sum over n and p of a a^T, [B, I, I]."""
        return second_moment(self.inputs(kept), 1.0)

    def some_samples(self, kept: Any, part: range, samples: int) -> Any | None:
        """Returns the kept tensors of a part of the `samples` samples; None if only rows can be split."""
        return None

    def some_gradients(self, kept: Any, g: Tensor, part: range, samples: int) -> Tensor:
        """Returns the rows of a part of the samples in g, or in another tensor of the shape of `on_run`'s output."""
        return of_samples(g, part, samples, self.batch_dim)

    def along(self, a_BNPI: Tensor, g_BNPO: Tensor, direction_BOI: Tensor) -> Tensor:
        """Returns <direction, sum over p of g a^T> of each sample, [N]."""
        # The side with fewer numbers per row is projected.
        if a_BNPI.shape[-1] > g_BNPO.shape[-1]:
            return ((a_BNPI @ direction_BOI.mT.unsqueeze(1)) * g_BNPO).sum((0, 2, 3))
        return ((g_BNPO @ direction_BOI.unsqueeze(1)) * a_BNPI).sum((0, 2, 3))

    def join(self, gradients: Sequence[Tensor]) -> Tensor:
        """Returns grad_BOI from the gradients of the parameters, in the statistics' dtype.

        Weights are flattened to [O, -1], the bias comes last; blocks are equal parts of O.
        """
        layers = gradients[0].shape[: gradients[0].ndim - len(self.shapes[0])]
        rows = gradients[0].shape[len(layers)]
        joined = torch.cat([gradient.reshape(*layers, rows, -1) for gradient in gradients], dim=-1).to(self.dtype)
        return joined.view(*layers, *self.shape.gradient)

    def split(self, direction_BOI: Tensor) -> list[Tensor]:
        """Returns one tensor per parameter, in its shape: the inverse of `join`."""
        widths = [shape.numel() // shape[0] for shape in self.shapes]
        layers = direction_BOI.shape[:-3]
        columns = direction_BOI.reshape(*layers, -1, direction_BOI.shape[-1]).split(widths, dim=-1)
        return [c.reshape(*layers, *shape) for c, shape in zip(columns, self.shapes, strict=True)]

    def _own_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self._weight, self._bias) if p is not None]

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def _bias(self) -> nn.Parameter | None:
        bias = getattr(self.module, "bias", None)
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    def _with_ones(self, a_BNPI: Tensor) -> Tensor:
        """Returns the rows with a last column of 1 if the module has a bias."""
        if self._bias is None:
            return a_BNPI
        return torch.cat([a_BNPI, a_BNPI.new_ones(*a_BNPI.shape[:-1], 1)], dim=-1)

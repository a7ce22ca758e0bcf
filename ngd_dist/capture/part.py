"""A part of a batch: evenly spaced samples of each micro-batch, from which statistics are made.

A backward pass from some rows of the output costs as much as from all of them, since autograd carries the others along
as zeros. So the Fisher of the model's own predictions has a forward pass of the part by itself, before that of the
whole batch: every trace in the model's modules is then of the whole batch. See docs/decisions/0027.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ngd_dist.capture.batches import Batches
from ngd_dist.config import NGDConfig
from ngd_dist.engines.evaluation import random_state_kept, standing_in
from ngd_dist.errors import CaptureError, ConfigError, NgdError
from ngd_dist.layers.hooks import tensors_in
from ngd_dist.layers.run import of_samples

__all__ = ["PartPass", "part_of", "samples_in_part"]

T = TypeVar("T")
WAY_OUT = "or leave out statistics_fraction"


def samples_in_part(samples: int, fraction: float) -> range:
    """Returns the samples, by number, that make up this fraction of so many: evenly spaced, at least one."""
    count = max(1, min(samples, math.ceil(samples * fraction - 1e-9)))  # 0.1 * 30 is above 3
    step = max(1, samples // count)
    return range(0, step * count, step)


def part_of(batch: T, fraction: float, *, samples: int | None = None, dim: int = 0) -> T:
    """Returns the batch with a fraction of its samples: evenly spaced, at least one, and always the same ones.

    batch: a tensor, or tuples, lists, mappings and dataclasses with tensors. A tensor with as many entries in `dim` as
        there are samples is cut there; a list of that length is cut too; all else stays.
    samples: their number. None: the length of the first tensor.

    An objective of a part of the batch makes a quadratic model cheaper. Raises: ConfigError.

    >>> import torch
    >>> from ngd_dist import part_of
    >>> x, y = part_of((torch.zeros(64, 3), torch.arange(64)), 1 / 16)
    >>> x.shape, y
    (torch.Size([4, 3]), tensor([ 0, 16, 32, 48]))
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction must be > 0 and <= 1, got {fraction}")
    if samples is None:
        samples = next((x.shape[dim] for x in tensors_in(batch) if x.ndim > dim), None)
        if samples is None:
            raise ConfigError(f"part_of needs a batch with a tensor in it, got {type(batch).__name__}")
    cut: T = _cut(batch, samples_in_part(samples, fraction), samples, dim)
    return cut


class PartPass:
    """Runs the model on a part of each batch, before the forward pass of the whole, and pairs the outputs of the two.

    It moves no buffer (running averages) and draws the random numbers of the pass that follows, which is as it would be
    by itself. Batch norm sees the part alone. Does nothing if statistics are of all samples, or need no such pass.
    """

    def __init__(self, model: nn.Module, config: NGDConfig) -> None:
        self._model = model
        self._fraction = config.statistics_fraction
        self._is_needed = config.fisher.kind != "empirical" and config.statistics_fraction < 1
        self._is_running = False
        self._latest: _Outputs | None = None
        self._of_whole: MutableMapping[Tensor, tuple[Tensor, _Outputs]] = WeakTensorKeyDictionary()

    @property
    def has_fisher_passes(self) -> bool:
        """Whether Fisher passes go through the forward pass that is under way."""
        return self._is_running or not self._is_needed

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], batches: Batches) -> None:
        """Runs the model on the part of these inputs, in the modes that the caller is in. Raises: CaptureError."""
        if self.has_fisher_passes or batches.is_in_call:
            return
        samples = batches.samples_in(args, kwargs)
        part = samples_in_part(samples, self._fraction)
        self._is_running = True
        try:
            with random_state_kept(self._model), standing_in(self._model, {}), batches.stated(len(part)):
                output = self._model(*_cut(args, part, samples, 0), **_cut(kwargs, part, samples, 0))
        except (NgdError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # the model's own, of the part's shape
            raise CaptureError(
                f"statistics_fraction runs the model on {len(part)} of {samples} samples first, and it failed there "
                f"({error}); give it tensors whose first dimension counts samples, {WAY_OUT}"
            ) from error
        finally:
            self._is_running = False
        self._latest = _Outputs(list(tensors_in(output)), part, samples)

    def pair(self, output: Any) -> None:
        """Notes the result of the model for the whole batch; None if it failed."""
        latest, self._latest = self._latest, None
        whole = list(tensors_in(output))
        if latest is not None and len(whole) == len(latest.tensors):
            for of_whole, of_part in zip(whole, latest.tensors, strict=True):
                self._of_whole[of_whole] = of_part, latest

    def outputs(self, whole: Sequence[Tensor], ignored: Tensor | None) -> tuple[Sequence[Tensor], Tensor | None]:
        """Returns the outputs that Fisher passes begin at, and their `ignored`: those of the part, if there is one.

        whole: of the model. ignored: see `NGD.fisher_backward`. Raises: CaptureError.
        """
        if not self._is_needed:
            return whole, ignored
        # Each of them is given once: what is left of the part's graph goes with the last of these.
        pairs, self._of_whole = [self._of_whole.get(output) for output in whole], WeakTensorKeyDictionary()
        outputs: list[Tensor] = []
        for pair, of_whole in zip(pairs, whole, strict=True):
            if pair is None:
                raise CaptureError(
                    "with statistics_fraction fisher_backward needs the result of the model itself, once for each "
                    f"forward pass, got another tensor, of shape {list(of_whole.shape)}: give it what the model "
                    f"returned (wrappers with find_unused_parameters or static_graph return copies), {WAY_OUT}"
                )
            output, (_, part, samples) = pair
            if len(output) * samples != len(of_whole) * len(part) or output.shape[1:] != of_whole.shape[1:]:
                raise CaptureError(
                    f"statistics_fraction needs outputs whose first dimension counts samples: {samples} samples gave "
                    f"{list(of_whole.shape)}, and {len(part)} of them {list(output.shape)}; {WAY_OUT[3:]}"
                )
            outputs.append(output)
        if ignored is not None and len(ignored) % samples == 0:  # any other shape is an error, as without a part
            ignored = of_samples(ignored, part, samples)
        return outputs, ignored


class _Outputs(NamedTuple):
    """The tensors that the model returned for a part of so many samples."""

    tensors: list[Tensor]
    part: range
    samples: int


def _cut(value: Any, part: range, samples: int, dim: int) -> Any:
    def is_cut(x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > dim and x.shape[dim] == samples

    if isinstance(value, Tensor):
        return of_samples(value, part, samples, dim) if is_cut(value) else value
    if isinstance(value, list) and len(value) == samples and not any(map(is_cut, value)):
        return [value[n] for n in part]
    if isinstance(value, Mapping):
        items = {key: _cut(item, part, samples, dim) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return items
        result = copy(value)
        result.update(items)
        return result
    if isinstance(value, list | tuple):
        parts = [_cut(item, part, samples, dim) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _cut(getattr(value, f.name), part, samples, dim) for f in fields(value)})
    return value

"""Gradient and update of each layer, measured in some steps, and the spectra of factors.

The owner of a layer measures it, one sum over ranks gathers all, and the host reads it in the next step: by then it has
waited for the device once, so that this read waits for nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_dist.covered import CoveredLayers
from ngd_dist.distributed import Sync
from ngd_dist.inversion.lanczos import STEPS, WIDTH, quantiles_of
from ngd_dist.statistics.statistic import Key
from ngd_dist.step.length import Factors
from ngd_dist.step.spectra import Estimate
from ngd_dist.telemetry import LayerStats, Spectrum

__all__ = ["LayerWatch", "is_watched"]

# Every step up to 7, then 4 of each doubling, from step 128 on every 32nd: short runs have points enough, and the cost
# of a long one is a 32nd of a measured step's.
SHORT_BITS, LONGEST = 3, 32
PRODUCTS = 3  # of a layer: direction and gradient, gradient and itself, direction and itself
SPECTRUM = 7  # numbers of a statistic: 1 if it is there, five quantiles, damping


def is_watched(step: int) -> bool:
    """Returns whether the layers are measured in this step.

    >>> [step for step in range(1, 41) if is_watched(step)][-6:]
    [16, 20, 24, 28, 32, 40]
    """
    return step % min(LONGEST, 1 << max(0, step.bit_length() - SHORT_BITS)) == 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Numbers on their way to the host, and what makes a `LayerStats` of them."""

    step: int
    numbers: Tensor
    copied: torch.cuda.Event | None
    lrs: list[float]
    estimates: Sequence[Estimate]
    is_clipped: bool


class LayerWatch:
    """Measures the layers of an optimizer. Every rank makes the same calls in the same steps."""

    def __init__(self, layers: CoveredLayers, sync: Sync, statistics: list[Key]) -> None:
        self._layers = layers
        self._sync = sync
        self._statistics = statistics
        self._products: Tensor | None = None
        self._waiting: _Waiting | None = None
        self._estimated: dict[Key, Spectrum] = {}

    @property
    def has_measured(self) -> bool:
        """Whether `measure` was called in this step."""
        return self._products is not None

    def measure(self, directions: Mapping[str, Tensor], gradients: Mapping[str, Tensor], device: torch.device) -> None:
        """Takes the products of the layers that this rank owns, [B, O, I] each. Reads nothing back."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        names = [name for name in self._layers if self._sync.reports(name)]
        rows = [[zero] * len(self._layers)] * PRODUCTS
        if names:
            d, g = ([of[name].flatten() for name in names] for of in (directions, gradients))
            dtype = torch.float64 if d[0].dtype == torch.float64 else torch.float32  # half precision overflows at 65504
            norms = [torch.stack(list(torch._foreach_norm(of, 2, dtype))).double().square().unbind() for of in (g, d)]
            inner = [torch.dot(x, y.to(x)).double() for x, y in zip(d, g, strict=True)]
            owned = [dict(zip(names, values, strict=True)) for values in (inner, *norms)]
            rows = [[values.get(name, zero) for name in self._layers] for values in owned]
        # Put together without an index: one of Python's would wait for the device.
        self._products = torch.stack([torch.stack(row) for row in rows])

    def send(
        self,
        step: int,
        factors: Factors | None,
        exact: Mapping[Key, Tensor],
        estimates: Sequence[Estimate],
        *,
        updates_weights: bool,
    ) -> None:
        """Collective if `measure` was called in this step.

        factors: None if the step was not taken. exact: spectra that the owner has, [7]: 1, five quantiles, damping.
        """
        products, self._products = self._products, None
        if products is None:
            return
        unknown, untold = products.new_zeros(SPECTRUM), products.new_zeros(WIDTH)
        told = [exact[key].to(products) if key in exact else unknown for key in self._statistics]
        told += [untold if one.told is None else one.told for one in estimates]
        numbers = torch.cat([products.flatten(), *told])
        self._sync.comm.all_reduce("layers of the step", numbers, kind="telemetry")
        if factors is None:
            return
        ones = products.new_ones(len(self._layers))
        of_layers = ones if factors.layers is None else factors.layers.to(ones)
        clip = ones.new_ones(1) if factors.clip is None else factors.clip.to(ones).view(1)
        lrs = [layer.lr if updates_weights else 1.0 for layer in self._layers.values()]
        host, copied = _on_its_way(torch.cat([numbers, of_layers, clip]))
        self._waiting = _Waiting(
            step, host, copied, lrs, [one._replace(told=None) for one in estimates], factors.clip is not None
        )

    def take(self) -> LayerStats | None:
        """Returns the numbers of an earlier step, once; None if none are on their way."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        if waiting.copied is not None:
            waiting.copied.synchronize()
        layers, parts = len(self._layers), (SPECTRUM * len(self._statistics), WIDTH * len(waiting.estimates))
        *products, exact, estimated, factors, clip = waiting.numbers.split([*[layers] * PRODUCTS, *parts, layers, 1])
        self._keep(waiting.estimates, estimated.view(-1, WIDTH))
        inner, gradients, directions = (of.tolist() for of in products)
        ((nu,), alphas) = clip.tolist(), factors.tolist()
        rows = list(zip(inner, gradients, directions, alphas, waiting.lrs, strict=True))
        return LayerStats(
            step=waiting.step,
            gradient_norms=[math.sqrt(g) for _, g, _, _, _ in rows],
            update_norms=[lr * abs(alpha * nu) * math.sqrt(d) for _, _, d, alpha, lr in rows],
            cosines=[x / math.sqrt(g * d) if g * d > 0 else math.nan for x, g, d, _, _ in rows],
            # alpha, not its square: see `StepLength.scale`.
            kl=sum(lr**2 * nu**2 * alpha * x for x, _, _, alpha, lr in rows) / 2,
            clip_factor=nu if waiting.is_clipped else None,
            spectra=self._spectra(exact.view(-1, SPECTRUM).tolist()),
        )

    def _keep(self, estimates: Sequence[Estimate], rows: Tensor) -> None:
        for (key, width, _), told in zip(estimates, rows, strict=True):
            count, damping = told[:2].tolist()
            found = quantiles_of(told, width) if count else None
            if found is not None:
                self._estimated[key] = Spectrum(found, damping, is_estimate=count > STEPS)

    def _spectra(self, rows: list[list[float]]) -> dict[str, Spectrum]:
        exact = {
            key: Spectrum((least, low, middle, high, largest), damping)
            for key, (is_there, least, low, middle, high, largest, damping) in zip(self._statistics, rows, strict=True)
            if is_there
        }
        known = self._estimated | exact
        return {str(key): known[key] for key in self._statistics if key in known}


def _on_its_way(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Returns the numbers in host memory, and the event after which they are there; None: they are."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied

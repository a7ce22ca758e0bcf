"""The record of an optimizer step, from what the optimizer tells of it."""

import math
import time
from collections.abc import Mapping

from torch import optim

from ngd_dist import NGD
from ngd_dist.telemetry import LayerStats, Spectrum
from ngd_workers.contract.events import Judged, Layers, Ranks, StepRecord
from ngd_workers.train.optimizers import chooses_lr, step_stats

__all__ = ["MOST_JUDGED", "MOST_LAYERS", "judged", "layers_of", "phases_of", "step_record"]

MOST_JUDGED = 1_000  # of some 46 bytes: 64 steps of them, and of the ages of 10,000 statistics, fit into one batch
MOST_LAYERS = 1_000  # of some 24 bytes, and two spectra of some 60


def phases_of(optimizer: optim.Optimizer, seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of the newest step by phase, the optimizer's beside those outside it."""
    phases = {**seconds, **step_stats(optimizer).seconds}
    phases["forward_backward"] -= phases.get("capture", 0.0)  # the hooks run inside: no second is counted twice
    return phases


def step_record(
    optimizer: optim.Optimizer,
    *,
    step: int,
    epoch: float,
    metrics: dict[str, float],
    samples_per_s: float,
    seconds: Mapping[str, float],
    bytes_sent: Mapping[str, int],
    skipped_samples: int,
    bytes_so_far: int | None = None,
    ranks: Ranks | None = None,
) -> StepRecord:
    """Returns the record of the newest step. seconds: of `phases_of`; bytes_sent: those of all kinds."""
    stats, settings = step_stats(optimizer), optimizer.param_groups[0]
    return StepRecord(
        step=step,
        epoch=epoch,
        time_s=time.time(),
        metrics=metrics,
        lr=settings["lr"],
        samples_per_s=samples_per_s,
        seconds=dict(seconds),
        bytes_sent=dict(bytes_sent),
        ages=list(stats.ages),
        intervals=list(stats.intervals),
        judged=judged(optimizer) if isinstance(optimizer, NGD) else None,
        failed_inversions=stats.failed_inversions,
        skipped_samples=skipped_samples,
        skipped_steps=stats.skipped_steps,
        damping=settings.get("damping"),
        momentum=settings["momentum"] if chooses_lr(optimizer) else None,
        reduction_ratio=stats.adapted.reduction_ratio,
        layers=layers_of(optimizer) if isinstance(optimizer, NGD) else None,
        ranks=ranks,
        bytes_so_far=bytes_so_far,
    )


def judged(optimizer: NGD) -> Judged | None:
    """Returns what decided on the statistics that were due, and how they were inverted; None if there is nothing.

    An infinite number is one that was not measured.
    """
    told = [
        one
        for one in optimizer.stats.refreshes
        if math.isfinite(one.change) or math.isfinite(one.error) or one.ending != "OK" or one.method is not None
    ]
    if not told:
        return None
    told = told[:MOST_JUDGED]
    place = {name: i for i, name in enumerate(optimizer.statistic_names)}
    methods: dict[str, list[int]] = {}
    for one in told:
        if one.method is not None:
            methods.setdefault(one.method, []).append(place[one.statistic])
    return Judged.model_construct(  # as it is: checking what was made here would double the cost
        statistics=[place[one.statistic] for one in told],
        changes=[_short(one.change) for one in told],
        noises=[_short(one.noise) for one in told],
        thresholds=[_short(one.threshold) for one in told],
        errors=[_short(one.error) for one in told],
        failed={place[one.statistic]: one.ending for one in told if one.ending != "OK"},
        residuals=[_short(one.residual, 2) for one in told],
        inversion_seconds=[None if one.method is None else _short(one.inversion_seconds, 3) for one in told],
        methods=methods,
    )


def layers_of(optimizer: NGD) -> Layers | None:
    """Returns what the newest step tells of each layer; None if it tells nothing."""
    told: LayerStats | None = optimizer.stats.layers
    if told is None:
        return None
    place = {name: i for i, name in enumerate(optimizer.statistic_names)}
    spectra = {place[name]: of for name, of in [*told.spectra.items()][: 2 * MOST_LAYERS]}
    return Layers.model_construct(  # as it is: see `judged`
        step=told.step,
        gradient_norms=[_number(norm) for norm in told.gradient_norms[:MOST_LAYERS]],
        update_norms=[_number(norm) for norm in told.update_norms[:MOST_LAYERS]],
        cosines=[_short(cosine) for cosine in told.cosines[:MOST_LAYERS]],
        kl=_short(told.kl),
        clip_factor=told.clip_factor,
        spectra={i: _columns(of) for i, of in spectra.items()},
        estimated=[i for i, of in spectra.items() if of.is_estimate],
    )


def _columns(spectrum: Spectrum) -> list[float | None]:
    return [_short(value) for value in (*spectrum.quantiles, spectrum.damping, spectrum.condition)]


def _number(value: float) -> float:
    return float(f"{value:.4g}")


def _short(value: float, digits: int = 4) -> float | None:
    """Returns so many digits; None: not measured."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None

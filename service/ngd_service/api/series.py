"""Pure: curves and matrices of a job from the spans of its steps, thinned out so that nothing seen is lost."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ngd_service.resources import (
    Anatomy,
    FactorInversion,
    FactorSpectrum,
    Judgements,
    LayerAnatomy,
    RankAnatomy,
    Series,
    Statistics,
)
from ngd_service.store.spans import GROUPS, JUDGED, KINDS, Span, Spans

__all__ = ["anatomy", "curves", "spans_for", "statistics"]

MOST_TOLD = 256  # layers or ranks: workers tell of no fewer


def spans_for(max_points: int) -> int:
    """Returns how many spans make a curve of at most so many points: two of each, and the first and the last step."""
    return (max_points - 2) // 2


def curves(known: Spans, names: Collection[str]) -> dict[str, Series]:
    """Returns the named curves, all if no name is given.

    Of each span the lowest and the highest value; where one is not finite, that and the highest. The parts of a group
    have the same steps, so that they can be stacked: those where their sum is lowest and highest.
    """
    samples_of: dict[str, dict[int, Any]] = {}
    for span in [*known.ends, *known.spans]:
        for name, extremes in span.content.items():
            if _is_wanted(name, names):
                samples_of.setdefault(name, {}).update(_drawn(extremes))
    series: dict[str, Series] = {}
    for name, samples in samples_of.items():
        in_order = sorted(samples.items())
        if name in GROUPS:
            series |= _stack(name, in_order, names)
        else:
            series[name] = Series(steps=[step for step, _ in in_order], values=[float(value) for _, value in in_order])
    return series


def statistics(names: Sequence[str], known: Spans, *, with_judged: bool = False) -> Statistics:
    """Returns ages and intervals at the last step of each span, and how often each was refreshed within it.

    Spans of steps that had another number of statistics are left out.
    """
    columns = [span for span in known.spans if len(span.content.get("ages", ())) == len(names)]

    def rows(field: str) -> list[list[int]]:
        return [list(row) for row in zip(*(span.content[field] for span in columns), strict=True)] or [
            [] for _ in names
        ]

    return Statistics(
        names=list(names),
        steps=[span.last_step for span in columns],
        ages=rows("ages"),
        intervals=rows("intervals"),
        refreshes=rows("refreshes"),
        judged=_judgements(len(names), columns) if with_judged else None,
        span=known.width,
        last_step=known.last_step,
    )


def anatomy(started: Mapping[str, Any], known: Spans) -> Anatomy:
    """Returns the newest of these spans. started: of the newest start, whose layers and statistics have the names.

    What was told before a start with other layers or ranks is left out.
    """
    newest = KINDS["newest"].merged([span.content for span in known.spans])
    names, statistics, hosts = (started.get(field, []) for field in ("layers", "statistics", "hosts"))
    layers, ranks = _fitting(newest.get("layers"), "cosines", names), _fitting(newest.get("ranks"), "cpu", hosts)
    spectra = {int(place): row for place, row in newest.get("spectra", {}).items()}
    inversions = {int(place): row for place, row in newest.get("inversions", {}).items()}
    owners = dict(enumerate(started.get("owners", [])))
    return Anatomy(
        layers=None if layers is None else LayerAnatomy(names=names[: len(layers["cosines"])], **layers),
        spectra=[
            _spectrum(statistics[place], *row) for place, row in sorted(spectra.items()) if place < len(statistics)
        ],
        inversions=[
            FactorInversion(
                name=statistics[place],
                owner=owners.get(place),
                step=step,
                method=method,
                residual=residual,
                seconds=seconds,
                ending=ending,
            )
            for place, (step, method, residual, seconds, ending) in sorted(inversions.items())
            if place < len(statistics)
        ],
        world_size=started.get("world_size", 1),
        ranks=None if ranks is None else RankAnatomy(hosts=hosts, device=started["device"], **ranks),
        last_step=known.last_step,
    )


def _spectrum(name: str, step: int, *row: Any) -> FactorSpectrum:
    """Returns what a row tells: quantiles, damping, condition and, since there are estimates, whether it is one."""
    damping, condition, *is_estimate = row[5:]
    return FactorSpectrum(
        name=name,
        step=step,
        quantiles=row[:5],
        damping=damping,
        condition=condition,
        is_estimate=any(is_estimate),
    )


def _fitting(told: Mapping[str, Any] | None, column: str, names: Sequence[str]) -> Mapping[str, Any] | None:
    """Returns what was told of as many as there are names or, where these are very many, of the first of them."""
    if told is None or not (len(told[column]) == len(names) or len(names) > len(told[column]) >= MOST_TOLD):
        return None
    return told


def _judgements(num_rows: int, columns: Sequence[Span]) -> Judgements | None:
    """Returns the matrices; None if the job's workers tell nothing of them, as earlier versions do."""
    judged = [span.content.get("judged", {}) for span in columns]
    failed = [span.content.get("failed", {}) for span in columns]
    if not any(judged) and not any(failed):
        return None
    places = [str(place) for place in range(num_rows)]
    unknown = (None,) * len(JUDGED)
    cells = [[of_step.get(place, unknown) for of_step in judged] for place in places]
    values = {field: [[cell[i] for cell in row] for row in cells] for i, field in enumerate(JUDGED)}
    return Judgements(endings=[[of_step.get(place) for of_step in failed] for place in places], **values)


def _drawn(extremes: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    low, high, lost = extremes
    return ((sample[0], sample[1]) for sample in (low if lost is None else lost, high) if sample is not None)


def _stack(group: str, samples: Sequence[tuple[int, dict[str, Any]]], names: Collection[str]) -> dict[str, Series]:
    """Returns the wanted parts of a group; a part that a step lacks is 0 there."""
    steps = [step for step, _ in samples]
    return {
        f"{group}.{part}": Series(steps=steps, values=[float(by_part.get(part, 0.0)) for _, by_part in samples])
        for part in _in_order(samples)
        if not names or group in names or f"{group}.{part}" in names
    }


def _in_order(samples: Iterable[tuple[int, dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(part for _, by_part in samples for part in by_part))


def _is_wanted(name: str, names: Collection[str]) -> bool:
    return not names or name in names or (name in GROUPS and any(wanted.startswith(f"{name}.") for wanted in names))

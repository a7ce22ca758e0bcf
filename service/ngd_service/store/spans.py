"""Pure: the summary of a span of steps, so that a curve of any length is drawn from a bounded number of them.

A span of level k is 2^k steps: number n holds the steps n 2^k + 1 to (n + 1) 2^k. Spans that lie side by side are
folded into wider ones, so that those of level 3 (of the steps themselves), 5 (of four of level 3), 7 ... can be kept up
to date as steps come in, and a reader takes the level that fits its screen.

curves       of each value, also of each metric, the lowest, the highest and the first that is not finite, each at its
             step; of a group of parts (seconds, bytes_sent, a resource of all ranks) those where their sum is such
statistics   ages and intervals at the span's last step, the refreshes within it, and of each statistic judged in it
             the newest change, noise, threshold and error, and of each that failed the newest ending
newest       the newest of what is told now and then: of layers, of each factor's spectrum and inversion, of ranks
evaluations  as curves, of the test data's metrics: test_<name>
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from pydantic import BaseModel

from ngd_workers.contract.events import Evaluation, StepRecord

__all__ = [
    "GROUPS",
    "JUDGED",
    "KINDS",
    "LOWEST",
    "RESOURCES",
    "WIDENING",
    "Kind",
    "Name",
    "Span",
    "Spans",
    "Wanted",
    "fold",
    "ladder",
    "level_for",
]

Name = Literal["curves", "statistics", "newest", "evaluations"]
LOWEST, WIDENING = 3, 2  # the first level that is kept, and how many levels lie between one that is and the next
RESOURCES = ("cpu", "memory_bytes", "gpu", "gpu_memory_bytes", "sent_bytes_per_s", "received_bytes_per_s")
GROUPS = ("seconds", "bytes_sent", *(f"ranks.{name}" for name in RESOURCES))
JUDGED = ("changes", "noises", "thresholds", "errors")  # in the order of a judged statistic's values
FIELDS = (  # of a step that are curves; its metrics can't have these names
    "lr",
    "momentum",
    "damping",
    "reduction_ratio",
    "samples_per_s",
    "epoch",
    "time_s",
    "failed_inversions",
    "skipped_steps",
    "skipped_samples",
    "bytes_so_far",
    "seconds",
    "bytes_sent",
)


@dataclass(frozen=True, slots=True)
class Span:
    """What is kept of some steps that follow each other; `content` is JSON-ready, and the kind's own."""

    last_step: int
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spans:
    """An answer: spans of `width` steps in order. ends: the first and the last step alone, where spans are wider.

    last_step: the newest that is stored of the kind, to_step at most; 0: none.
    """

    width: int
    last_step: int
    spans: list[Span]
    ends: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a reader asks for: each step by itself where they are at most most_steps, else at most most_spans spans.

    Spans have at least `width` steps; the first may begin before from_step, and the last end after to_step.
    """

    from_step: int = 0
    to_step: int | None = None
    most_steps: int
    most_spans: int
    width: int = 1


@dataclass(frozen=True, slots=True)
class Kind:
    """How one step's record becomes a span's content, and how contents of neighbours become one."""

    of_record: Callable[[Mapping[str, Any]], dict[str, Any]]
    merged: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


def fold(kind: Kind, spans: Iterable[Span], level: int) -> list[Span]:
    """Returns spans of this level made of narrower ones, which come in order."""
    folded = []
    for _, neighbours in groupby(spans, key=lambda span: (span.last_step - 1) >> level):
        narrow = list(neighbours)
        content = narrow[0].content if len(narrow) == 1 else kind.merged([span.content for span in narrow])
        folded.append(Span(narrow[-1].last_step, content))
    return folded


def ladder(last_step: int) -> list[int]:
    """Returns the levels that are kept of a run: up to the one of which a single span holds all steps."""
    top = max(0, last_step - 1).bit_length()
    return list(range(LOWEST, max(top, LOWEST) + WIDENING, WIDENING))


def level_for(first_step: int, last_step: int, most_spans: int, width: int = 1) -> int:
    """Returns the finest level, of spans no narrower than `width`, of which at most so many hold these steps."""
    level = max(0, (width - 1).bit_length())
    while ((last_step - 1) >> level) - ((first_step - 1) >> level) >= most_spans:
        level += 1
    return level


def _trained(record: Mapping[str, Any]) -> dict[str, Any]:
    known = _of_this_version(record, StepRecord)
    values = {name: known.get(name) for name in FIELDS} | known["metrics"]
    return _curves(known["step"], values | _of_ranks(known.get("ranks"))) | _of_layers(known.get("layers"))


def _tested(record: Mapping[str, Any]) -> dict[str, Any]:
    known = _of_this_version(record, Evaluation)
    return _curves(known["step"], {f"test_{name}": value for name, value in known["metrics"].items()})


def _of_ranks(ranks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns of each resource the ranks that tell it; a metric's name has no dot."""
    if ranks is None:
        return {}
    known = {
        f"ranks.{name}": {str(rank): value for rank, value in enumerate(ranks[name]) if value is not None}
        for name in RESOURCES
    }
    return {name: by_rank for name, by_rank in known.items() if by_rank}


def _of_layers(layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what all layers make up, at the step that was measured."""
    if layers is None:
        return {}
    cosines = [cosine for cosine in layers["cosines"] if cosine is not None]
    values = {
        "layers.gradient_norm": math.hypot(*map(float, layers["gradient_norms"])),
        "layers.update_norm": math.hypot(*map(float, layers["update_norms"])),
        "layers.lowest_cosine": min(cosines, default=None),
        "layers.kl": layers["kl"],
        "layers.clip_factor": layers["clip_factor"],
    }
    return _curves(layers["step"], values)


def _newest(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what few records have; spectra and inversions by the place of their statistic."""
    layers, ranks, content = record.get("layers"), record.get("ranks"), dict[str, Any]()
    if layers is not None:
        estimated = {str(place) for place in layers.get("estimated", ())}
        spectra = {str(p): [layers["step"], *row, str(p) in estimated] for p, row in layers["spectra"].items()}
        of_layers = {name: value for name, value in layers.items() if name not in ("spectra", "estimated")}
        content = {"layers": of_layers, "spectra": spectra}
    inversions = _inversions(record["step"], record.get("judged") or {})
    content |= {"inversions": inversions} if inversions else {}
    return content | ({} if ranks is None else {"ranks": ranks | {"step": record["step"]}})


def _inversions(step: int, judged: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns step, method, residual, seconds and ending of those inverted, and of those that failed before it."""
    if not judged.get("residuals"):  # of an earlier version; one that this version has stored has an empty column
        return {}
    method_of = {place: method for method, places in judged["methods"].items() for place in places}
    failed = {int(place): ending for place, ending in judged["failed"].items()}
    columns = zip(judged["statistics"], judged["residuals"], judged["inversion_seconds"], strict=True)
    return {
        str(place): [step, method_of.get(place), residual, seconds, failed.get(place, "OK")]
        for place, residual, seconds in columns
        if place in method_of or place in failed
    }


def _merged_newest(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for content in contents:
        by_place = {name: merged.get(name, {}) | content.get(name, {}) for name in ("spectra", "inversions")}
        merged |= content | {name: rows for name, rows in by_place.items() if rows}
    return merged


def _of_this_version(record: Mapping[str, Any], model: type[BaseModel]) -> Mapping[str, Any]:
    """Returns the record with its metrics in one place: version 0.1 stored each as a field."""
    return record if "metrics" in record else model.model_validate(record).model_dump()


def _curves(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Some steps lack some values: those of an earlier version, of another loop, or of a setting not adapted."""
    return {name: _alone([step, value]) for name, value in values.items() if value is not None}


def _alone(sample: list[Any]) -> list[Any]:
    """Returns lowest, highest and not finite, of one sample."""
    return [sample, sample, None] if math.isfinite(_height(sample)) else [None, None, sample]


def _merged_curves(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    extremes: dict[str, list[Any]] = {}
    for content in contents:
        for name, (low, high, lost) in content.items():
            best = extremes.get(name)
            if best is None:
                extremes[name] = [low, high, lost]
                continue
            if low is not None and (best[0] is None or _height(low) < _height(best[0])):
                best[0] = low
            if high is not None and (best[1] is None or _height(high) > _height(best[1])):
                best[1] = high
            best[2] = best[2] or lost
    return extremes


def _height(sample: Sequence[Any]) -> float:
    value = sample[1]
    return sum(map(float, value.values())) if isinstance(value, dict) else float(value)  # "NaN" travels as a string


def _statistics(record: Mapping[str, Any]) -> dict[str, Any]:
    ages = record["ages"]
    if not ages:
        return {}
    content = {"ages": ages, "intervals": record["intervals"], "refreshes": [int(age == 0) for age in ages]}
    judged = record.get("judged")  # versions before it have none
    if judged is None:
        return content
    columns = [judged[field] for field in JUDGED]
    told = zip(map(str, judged["statistics"]), map(list, zip(*columns, strict=True)), strict=True)
    rows = {place: row for place, row in told if any(value is not None for value in row)}
    return content | {"judged": rows, "failed": {str(place): ending for place, ending in judged["failed"].items()}}


def _merged_statistics(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of steps that had another number of statistics, as an attempt with another model has, the last ones' count."""
    last: dict[str, Any] = next((content for content in reversed(contents) if content), {})
    if not last:
        return last
    alike = [content for content in contents if content and len(content["ages"]) == len(last["ages"])]
    merged = last | {"refreshes": [sum(column) for column in zip(*(one["refreshes"] for one in alike), strict=True)]}
    for field in ("judged", "failed"):
        newest = {place: value for one in alike for place, value in one.get(field, {}).items()}
        merged |= {field: newest} if newest else {}
    return merged


KINDS: dict[Name, Kind] = {
    "curves": Kind(_trained, _merged_curves),
    "statistics": Kind(_statistics, _merged_statistics),
    "newest": Kind(_newest, _merged_newest),
    "evaluations": Kind(_tested, _merged_curves),
}

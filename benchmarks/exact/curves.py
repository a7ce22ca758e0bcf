"""The course of a training: [steps, CPU seconds without the scores, score] at some of its steps."""

import time
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Points", "curve", "follow", "seconds_of", "to_reach"]

Points: TypeAlias = list[list[float]]
MARKS = 100


def follow(step: Callable[[], Any], score: Callable[[], float], steps: int, *, stride: int = 1) -> Points:
    """Returns the points of so many calls of step, evenly spaced in the logarithm. stride: steps that a call takes."""
    marks = {round(steps ** (mark / MARKS)) for mark in range(MARKS + 1)}
    points, seconds = [[0, 0.0, score()]], 0.0
    for call in range(1, steps + 1):
        start = time.process_time()
        step()
        seconds += time.process_time() - start
        if call in marks:
            points.append([call * stride, round(seconds, 4), float(f"{score():.4g}")])
    return points


def curve(problem: str, method: str, seed: int, points: Points) -> dict[str, Any]:
    return {"problem": problem, "method": method, "seed": seed, "points": points}


def to_reach(points: Points, target: float) -> tuple[float, float]:
    """Returns the steps and the seconds to the first score at most the target; infinity if there is none."""
    return next(((step, seconds) for step, seconds, score in points if score <= target), (float("inf"), float("inf")))


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Returns the CPU seconds of one call, of this many in a row."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats

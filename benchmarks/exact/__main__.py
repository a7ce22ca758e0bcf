"""What do the exact methods gain over their rivals, in steps and CPU seconds, and what do their steps cost?

Every method has the same first parameters, points or observations of each seed. Seconds are CPU time of one thread,
without evaluations. Parts that are not named keep their last figures.

    python -m benchmarks.exact --hardware cpu2
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from benchmarks.exact import arrivals, cost, equations, examples, rates
from benchmarks.exact.tables import table
from benchmarks.record import folder_for, write

SEEDS, PAIRS = range(5), range(20)
LONGEST = (1.0, 128.0)  # first lengths of the line search: a Gauss-Newton step, and far beyond


def each(rows_of: Callable[[Any], list[dict[str, Any]]], items: Iterable[Any]) -> list[dict[str, Any]]:
    return [row for item in items for row in rows_of(item)]


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "equations": lambda: [row for p in equations.PROBLEMS for row in each(partial(equations.curves, p), SEEDS)],
    "classifier": lambda: each(examples.classifier, SEEDS),
    "mixture": lambda: each(examples.mixture, range(10)),
    "categories": lambda: each(examples.categories, SEEDS),
    "waveform": lambda: [row for frequency in (15, 30) for row in examples.waveform(frequency, 4)],
    "arrivals": lambda: [row for longest in LONGEST for row in each(partial(arrivals.arrivals, longest), PAIRS)],
    "rates": rates.rates,
    "beside_adam": lambda: each(cost.beside_adam, equations.PROBLEMS),
    "growth": cost.growth,
    "ranks": cost.over_ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu2")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = folder_for("exact", arguments.hardware)
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result.pop("environment", None)
    for part in arguments.parts:
        result[part] = PARTS[part]()
        write(folder, result, table(result))
        print(f"{part}: done", flush=True)


if __name__ == "__main__":
    main()

"""Counts the functions and the files that a newcomer follows through one step of the optimizer.

The step is forward, backward and `NGD.step` of Linear-ReLU-Linear on one rank, with each statistic refreshed in it. The
files of one statistic are those with a function that holds it, or its key, in a variable or in a container in one.

Run: python docs/reference/trace_step.py
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import ngd_dist
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval
from ngd_dist.statistics.statistic import Key

LIBRARY = Path(ngd_dist.__file__).parent
WARM_UP_STEPS = 3  # after which no function runs for the first time alone
STATISTIC = Key("0", "A")
SHAPES = {(1, 9, 9), (45,)}  # of its matrix and of its packed triangle, and of no other tensor


def trace() -> tuple[list[CodeType], set[str]]:
    """Returns the functions of ngd_dist that one step calls, with repetitions, and the files that hold STATISTIC."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval(steps=1), lr=0.1, damping=0.1))
    x, y = torch.randn(16, 8), torch.randint(4, (16,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(WARM_UP_STEPS):
        step()
    called: list[CodeType] = []
    holding: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if not frame.f_code.co_filename.startswith(f"{LIBRARY}/"):
            return
        if event == "call":
            called.append(frame.f_code)
        elif event == "return" and holds([argument, *frame.f_locals.values()]):
            holding.add(frame.f_code.co_filename)

    sys.setprofile(note)
    step()
    sys.setprofile(None)
    return called, holding


def holds(value: object, depth: int = 3) -> bool:
    """Returns whether the value is STATISTIC or its key, or has it at most `depth` containers deep."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape) in SHAPES
    if isinstance(value, Key):
        return value == STATISTIC
    if depth == 0:
        return False
    if isinstance(value, dict):
        return any(holds(item, depth - 1) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return any(holds(item, depth - 1) for item in value)
    if dataclasses.is_dataclass(value):
        return any(holds(getattr(value, field.name, None), depth - 1) for field in dataclasses.fields(value))
    return False


def main() -> None:
    called, holding = trace()
    files = [code.co_filename for code in called]
    changes = sum(before != after for before, after in itertools.pairwise(files))
    modules = sum(1 for _ in LIBRARY.rglob("*.py"))
    print(f"{len(called)} calls of {len(set(called))} functions, {changes} changes of file")
    print(f"{len(set(files))} of the {modules} files of ngd_dist; {len(holding)} (*) hold {STATISTIC}:")
    for file in sorted(set(files)):
        print(f"{'*' if file in holding else ' '} {Path(file).relative_to(LIBRARY)}")


if __name__ == "__main__":
    main()

"""Counts the functions and the files that a newcomer follows through one step of the optimizer.

The step is forward, backward and `NGD.step` of Linear-ReLU-Linear on one rank, with each statistic refreshed in it.

Run: python docs/reference/trace_step.py
"""

import itertools
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import ngd_dist
from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval

LIBRARY = Path(ngd_dist.__file__).parent
WARM_UP_STEPS = 3  # after which no function runs for the first time alone


def trace() -> list[CodeType]:
    """Returns the functions of ngd_dist that one step calls, in order, with repetitions."""
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

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(LIBRARY):
            called.append(frame.f_code)

    sys.setprofile(note)
    step()
    sys.setprofile(None)
    return called


def main() -> None:
    called = trace()
    files = [code.co_filename for code in called]
    changes = sum(before != after for before, after in itertools.pairwise(files))
    modules = sum(1 for _ in LIBRARY.rglob("*.py"))
    print(f"{len(called)} calls of {len(set(called))} functions, {changes} changes of file")
    print(f"{len(set(files))} of the {modules} files of ngd_dist:")
    for file in sorted(set(files)):
        print(f"  {Path(file).relative_to(LIBRARY)}")


if __name__ == "__main__":
    main()

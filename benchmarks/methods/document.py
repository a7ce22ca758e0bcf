"""docs/methods.md: what each method is, from the registry, and what the comparison found, from its newest result."""

import inspect
from math import prod
from typing import Any

from benchmarks.methods import protocol
from benchmarks.methods.page import overall
from ngd_dist import NGDConfig
from ngd_dist.config import PRECONDITIONERS, PreconditionerConfig
from ngd_dist.config.methods.base import is_ours
from ngd_dist.factors.cost import LayerShape
from ngd_dist.preconditioners import preconditioner_for

__all__ = ["compared", "document", "registry"]

WIDTH = 512
HEAD = """<!-- Written by python -m benchmarks.report; what was found, by hand, in conclusion.md of the result. -->
# Methods compared

One line chooses how the Fisher block of a layer is approximated: `preconditioner: {kind: ekfac}` in a job,
`NGDConfig(preconditioner=EKFAC())` in a loop of your own. Distribution, stale statistics, checkpoints, engines and
telemetry are the same for all. [Settings](guides/settings.md#which-method) says which to take for what,
[configuration](configuration.md#preconditioner) has each setting, and [from equation to function](algorithm.md) each
formula with its source and test. SNGD changes the model instead, and any optimizer trains it:
[`transform: {kind: sngd}`](guides/optimizers.md#natural-gradient-steps-under-a-plain-optimizer-sngd).
"""

NOT_YET = """## Which one is the fastest

`python -m benchmarks.methods` answers it, for all methods and seven rivals by the same search; no run of it has come to
its end yet. [Performance](performance.md) has K-FAC's two recipes beside six rivals.
"""
LNGD = """## Why LNGD stops short of a small training loss

Its rate per layer divides by the empirical Fisher, which vanishes with the square of the loss's gradients: near a small
loss the rate grows without bound. K-FAC with that rate misses the target on the digits too, and with a given rate it
needs 50 steps. Each part was tried alone (`benchmarks/results/2026-11-30_lngd_cpu2`). Take `step_length: {kind: given}`
with a clip where training should come near a loss of 0.
"""


def document(approximations: str, comparison: str) -> str:
    """Returns the page. approximations: their table; comparison: what `compared` returns, empty before there is one."""
    parts = [HEAD, "## What each keeps\n", registry(), comparison or NOT_YET]
    return "\n".join([*parts, LNGD, "## How near each comes to the Fisher block\n", approximations.strip() + "\n"])


def compared(rows: list[dict[str, Any]], conclusion: str, figure: str) -> str:
    """Returns what the comparison found, by hand and by its rows, and how it was measured."""
    parts = ["## What was found\n", conclusion.strip() + "\n", f"![CPU seconds to each target, by method]({figure})\n"]
    parts += ["\n".join(overall(rows)) + "\n", "## How it was measured\n", (protocol.__doc__ or "").strip() + "\n"]
    return "\n".join([*parts, "Every trial is in [performance](performance.md).\n"])


def registry() -> str:
    """Returns the table of all methods of this package, for a linear layer of WIDTH inputs, a bias, WIDTH outputs."""
    lines = ["| `kind` | what it is | statistics | numbers that travel | numbers kept | refresh, Mflop | step, Mflop |"]
    lines += ["|---" * 7 + "|", *(_row(kind, choice()) for kind, choice in PRECONDITIONERS.items() if is_ours(choice))]
    of = f"A linear layer of {WIDTH} inputs, with a bias, and {WIDTH} outputs has {WIDTH * (WIDTH + 1):,} weights. SENG"
    of += " keeps a gradient of each sample: its figures are for one sample, and none of its statistics travels."
    return "\n".join([*lines, "", of, ""])


def _row(kind: str, choice: PreconditionerConfig) -> str:
    shape = LayerShape("layer", "kronecker", WIDTH + 1, WIDTH)
    method = preconditioner_for(shape, NGDConfig(preconditioner=choice))
    travelling = sum(spec.form.numbers for spec in method.statistics if not spec.is_local)
    kept = sum(prod(shape) for shape in method.cache_shapes.values())
    summary = (inspect.getdoc(choice) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    statistics = ", ".join(spec.name for spec in method.statistics)
    flops = (
        f"{count / 1e6:,.0f}" if count >= 1e6 else "< 1" for count in (method.refresh_flops(), method.apply_flops())
    )
    return f"| `{kind}` | {summary} | {statistics} | {travelling:,} | {kept:,} | {' | '.join(flops)} |"

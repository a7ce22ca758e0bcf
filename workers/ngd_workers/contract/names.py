"""Names that both specs and events use."""

from typing import Annotated

from pydantic import AfterValidator, Field

__all__ = ["TAKEN", "MetricName"]

# The other curves of a job: the fields of a step's record.
TAKEN = frozenset(
    {
        "step",
        "epoch",
        "time_s",
        "metrics",
        "lr",
        "samples_per_s",
        "seconds",
        "bytes_sent",
        "ages",
        "intervals",
        "judged",
        "failed_inversions",
        "skipped_samples",
        "skipped_steps",
        "damping",
        "momentum",
        "reduction_ratio",
        "layers",
        "ranks",
        "bytes_so_far",
    }
)


def _refuse_taken(name: str) -> str:
    """A metric's curve has its name, and that of its test values has test_ before it: both must be its own."""
    if name in TAKEN or name.startswith("test_"):
        taken = "test_ marks the values of the test data" if name.startswith("test_") else "each step has such a field"
        raise ValueError(f"a metric can't be called {name!r}: {taken}; choose another name")
    return name


MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$"), AfterValidator(_refuse_taken)]

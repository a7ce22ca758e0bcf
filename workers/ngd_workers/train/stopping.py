"""How a request to stop reaches all ranks after the same step: rank 0 has it, and a sum over ranks carries its code."""

from ngd_workers.contract.errors import SupersededError
from ngd_workers.train.context import TrainContext

__all__ = ["is_cancelled", "stop_code_of"]

STOP_CODES = {None: 0, "cancelled": 1, "superseded": 2}


def stop_code_of(context: TrainContext) -> float:
    """Returns this rank's summand: 0 without a request, and on every rank but 0."""
    return float(STOP_CODES[context.reporter.stop_request])


def is_cancelled(stop_code: float, context: TrainContext) -> bool:
    """Returns whether the sum over ranks asks for an end in order. Raises: SupersededError."""
    if stop_code == STOP_CODES["superseded"]:
        raise SupersededError(f"attempt {context.attempt} stops: a later attempt of the same job has taken over")
    return stop_code == STOP_CODES["cancelled"]

"""How a request to stop reaches all ranks after the same step: a sum over ranks carries its code.

Rank 0 hears the service and finds the files of the attempt's directory. Any rank may be told to end by a signal.
"""

from ngd_workers.contract.errors import SupersededError
from ngd_workers.report.reporter import StopRequest
from ngd_workers.train.context import TrainContext

__all__ = ["request_of", "stop_code_of"]

# Powers of a number above that of all ranks: the strongest request shows in the sum, however many ranks make which.
RANKS = 2**13
STOP_CODES: dict[StopRequest, float] = {"resized": 1.0, "cancelled": float(RANKS), "superseded": float(RANKS**2)}


def stop_code_of(context: TrainContext) -> float:
    """Returns this rank's summand: 0 without a request. A sum over ranks is exact in float64."""
    request = context.reporter.stop_request
    asked = 0.0 if request is None else STOP_CODES[request]
    return max(asked, STOP_CODES["cancelled"] if context.is_told_to_end() else 0.0)


def request_of(total: float, context: TrainContext) -> StopRequest | None:
    """Returns the strongest request in the sum over ranks; None: to go on. Raises: SupersededError."""
    if total >= STOP_CODES["superseded"]:
        raise SupersededError(f"attempt {context.attempt} stops: a later attempt of the same job has taken over")
    if total >= STOP_CODES["cancelled"]:
        return "cancelled"
    return "resized" if total else None

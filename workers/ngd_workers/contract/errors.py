"""The errors with which a job's workers end, short of a crash.

WorkerError
+-- SpecError (ValueError)                    the spec contradicts itself, the data or the machine
+-- DataNotFoundError (FileNotFoundError)     a data file or folder isn't there
+-- InvalidDataError (ValueError)             a data file is damaged, or data don't fit together
+-- UserCodeError (RuntimeError)              the user's own function failed
+-- IncompatibleCheckpointError (ValueError)  the run directory's checkpoint belongs to another model
+-- NonFiniteLossError (ArithmeticError)      training diverged
+-- SupersededError (RuntimeError)            a later attempt of the same job has taken over
+-- ClusterError (RuntimeError)               the workers died too often, or Ray could not start them
|   +-- RayStartError                         Ray itself did not start, or does not answer
+-- StorageError (OSError)                    a file can't be read or written, for longer than a moment
"""

from typing import ClassVar

__all__ = [
    "ClusterError",
    "DataNotFoundError",
    "IncompatibleCheckpointError",
    "InvalidDataError",
    "NonFiniteLossError",
    "RayStartError",
    "SpecError",
    "StorageError",
    "SupersededError",
    "UserCodeError",
    "WorkerError",
]


class WorkerError(Exception):
    """Base. `reason` is the word that machines see; `retryable` says whether another attempt could end differently."""

    reason: ClassVar[str]
    retryable: ClassVar[bool] = False


class SpecError(WorkerError, ValueError):
    """The spec contradicts itself, the data or the machine."""

    reason = "InvalidSpec"


class DataNotFoundError(WorkerError, FileNotFoundError):
    """A data file or folder isn't there."""

    reason = "DataNotFound"


class InvalidDataError(WorkerError, ValueError):
    """A data file is damaged, or data don't fit together."""

    reason = "InvalidData"


class UserCodeError(WorkerError, RuntimeError):
    """The user's own function or model failed."""

    reason = "UserCodeError"


class IncompatibleCheckpointError(WorkerError, ValueError):
    """The run directory's checkpoint belongs to another model or optimizer."""

    reason = "IncompatibleCheckpoint"


class NonFiniteLossError(WorkerError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; the same spec would end there again."""

    reason = "NonFiniteLoss"


class SupersededError(WorkerError, RuntimeError):
    """A later attempt of the same job has taken over; this one must write nothing more."""

    reason = "Superseded"


class ClusterError(WorkerError, RuntimeError):
    """Ray could not start the workers, or they died more often than the spec allows."""

    reason = "ClusterFailed"
    retryable = True


class RayStartError(ClusterError):
    """Ray did not start on this machine, or the Ray cluster that runs the driver does not answer."""

    reason = "RayNotStarted"


class StorageError(WorkerError, OSError):
    """A file of the job can't be read or written, and not for a moment only: a full disk, a lost volume."""

    reason = "StorageUnavailable"
    retryable = True

"""The errors that this library raises.

NgdError
+-- ConfigError (ValueError)             settings that contradict the model or the process group
+-- CaptureError (RuntimeError)          a layer ran in a way its statistics can't describe
+-- CollectiveError (RuntimeError)       a collective failed or timed out; the message names the culprit rank
+-- InversionError (ArithmeticError)     more inversions have failed than max_failed_inversions
+-- NonFiniteError (FloatingPointError)  a gradient is NaN or infinite
+-- CheckpointError (ValueError)         a state that doesn't fit this model
"""

__all__ = [
    "CaptureError",
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "InversionError",
    "NgdError",
    "NonFiniteError",
]


class NgdError(Exception):
    """Base of every error of this library."""


class ConfigError(NgdError, ValueError):
    """Settings that contradict the model, its parameters or the process group."""


class CaptureError(NgdError, RuntimeError):
    """A layer ran in a way that its statistics can't describe."""


class CollectiveError(NgdError, RuntimeError):
    """A collective failed or timed out."""


class InversionError(NgdError, ArithmeticError):
    """More inversions have failed than the settings allow."""


class NonFiniteError(NgdError, FloatingPointError):
    """A gradient is NaN or infinite."""


class CheckpointError(NgdError, ValueError):
    """A saved state that doesn't fit this model."""

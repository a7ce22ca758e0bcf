"""Text of others on a terminal: a log, a job's message or a name may hold sequences that move, hide or answer."""

import re

__all__ = ["harmless"]

# ECMA-48: CSI and OSC (or DCS, SOS, PM, APC) sequences with their parameters, and ESC with one character.
SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")  # these show a line in another order than it has


def harmless(text: str) -> str:
    """Returns the text without control sequences: colours go, other control characters show as \\x1b."""
    text = SEQUENCE.sub("", text)
    return DIRECTION.sub("", CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text))

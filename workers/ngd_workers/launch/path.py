"""The order of the path: all of ours before anything of a user's. Imports nothing that a user's folder could hide."""

import sys

__all__ = ["present_folder_last"]


def present_folder_last() -> None:
    """Moves the present folder, which `python -m` puts first on the path, to its end."""
    if not sys.flags.safe_path:
        sys.path.append(sys.path.pop(0))

"""Image files by class: `<class>/<image>` below a folder, or below a folder in a zip file."""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError

__all__ = ["EXTENSIONS", "files_below", "same_classes", "sorted_into_classes"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})


def files_below(root: Path) -> list[str]:
    """Returns the files and the folders ("name/") below `root`, relative to it. Raises: DataNotFoundError."""
    if not root.is_dir():
        raise DataNotFoundError(f"no folder {root}; it should hold a folder of images for each class")
    listed: list[str] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        below = "" if folder == str(root) else os.path.relpath(folder, root) + "/"
        listed += [f"{below}{name}/" for name in folders]
        listed += [below + name for name in files]
    return listed


def sorted_into_classes(names: Iterable[str], where: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Returns the class names in order, and (file, number of its class) of each image, class after class.

    names: `<class>/.../<image>`, and folders with a "/" at their end. Hidden files, and those that have no extension of
    an image, are left out. Raises: InvalidDataError.
    """
    images: dict[str, list[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts):
            continue
        if name.endswith("/"):
            images.setdefault(path.parts[0], [])
        elif path.suffix.lower() in EXTENSIONS:
            if len(path.parts) == 1:
                raise InvalidDataError(f"{where}/{name} lies in no class; move it into a folder named after its class")
            images.setdefault(path.parts[0], []).append(name)
    if not images:
        raise InvalidDataError(f"{where} holds no class: it should hold a folder of images for each class")
    if empty := sorted(name for name, files in images.items() if not files):
        raise InvalidDataError(
            f"{where}/{empty[0]} holds no image ({', '.join(sorted(EXTENSIONS))}); remove the folder, or fill it"
        )
    classes = sorted(images)
    return classes, [(name, label) for label, cls in enumerate(classes) for name in sorted(images[cls])]


def same_classes(first: list[str], second: list[str], first_where: str, second_where: str) -> None:
    """Raises: InvalidDataError if the parts have not the same classes."""
    for have, lack, there, not_there in (
        (first, second, first_where, second_where),
        (second, first, second_where, first_where),
    ):
        if missing := sorted(set(have) - set(lack)):
            raise InvalidDataError(
                f"{there} has {len(have)} classes and {not_there} has {len(lack)}: {missing[0]!r} is in the first "
                "alone; both parts must have the same ones"
            )

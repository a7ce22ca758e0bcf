"""Generated images in the forms of the recipes' data sets: each is plain, and its shade tells its class."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_image_folder", "write_jpeg_npz"]


def write_jpeg_npz(path: Path, *, samples: int, classes: int, side: int = 32) -> list[int]:
    """Writes images of classes 0, 1, ... in turn; returns the shade of each."""
    shades = [20 + 200 * (number % classes) // classes + number % 7 for number in range(samples)]
    files = [_jpeg(shade, side) for shade in shades]
    header = 2  # the marker that every JPEG file begins with; the copy of CIFAR-10 shares its tables, too
    assert len({file[:header] for file in files}) == 1
    bodies = [file[header:] for file in files]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        header=np.frombuffer(files[0][:header], np.uint8),
        body=np.frombuffer(b"".join(bodies), np.uint8),
        offsets=np.cumsum([0, *map(len, bodies)]).astype(np.int64),
        labels=np.array([number % classes for number in range(samples)], np.int64),
    )
    return shades


def write_image_folder(folder: Path, *, classes: int, train: int, test: int, side: int = 48) -> None:
    """Writes folder/{train,val}/<class>/<number>.jpg: as many images of each class."""
    for part, count in (("train", train), ("val", test)):
        for label in range(classes):
            place = folder / part / f"n{label:08d}"
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.jpg").write_bytes(_jpeg(20 + 200 * label // classes + number % 7, side))


def _jpeg(shade: int, side: int) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(stored, "jpeg", quality=75)
    return stored.getvalue()

"""Image files as tests need them: of one colour or of noise, in any format."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(
    seed: int, mode: str = "RGB", size: tuple[int, int] = (24, 16), kind: str = "jpeg", **options: Any
) -> bytes:
    """Returns an image file of smooth random colours; size is (width, height)."""
    channels = {"RGB": 3, "L": 1, "CMYK": 4, "RGBA": 4}[mode]
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse, mode).resize(size, Image.Resampling.BILINEAR)
    return encoded(image, kind, **options)


def encoded(image: Image.Image, kind: str = "jpeg", **options: Any) -> bytes:
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def picture_folder(root: Path, parts: dict[str, int], classes: int = 3) -> Path:
    """Makes `root/<part>/<class>/<number>.jpg`, so many images a part, dealt to the classes in turn."""
    for part, images in parts.items():
        for number in range(images):
            folder = root / part / f"class{number % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:04d}.jpg").write_bytes(picture(seed=number + 100_000 * (part != "train")))
    return root

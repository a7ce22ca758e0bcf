"""From the bytes of an image file to the pixels that a model sees.

Samples stay uint8 until they are on the model's device: they cross processes and the bus at a quarter of the size.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from ngd_workers.contract.errors import InvalidDataError
from ngd_workers.contract.spec import ImageSettings, NoAugment, PadCrop, RandomResizedCrop
from ngd_workers.data.base import Dataset, Images, Shards

try:
    import simplejpeg
except ImportError:  # an extra; Pillow decodes JPEG files at three quarters of its speed
    simplejpeg = None

__all__ = [
    "EncodedImages",
    "ImagePart",
    "Normalize",
    "augmented",
    "centred",
    "decode",
    "image_dataset",
]

PIXEL_MAX = 255.0
EXIF_ORIENTATION, UPRIGHT = 0x0112, 1
# markers of a JPEG file: each begins a segment
SOI, APP1, SOS = b"\xff\xd8", 0xE1, 0xDA
SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


class EncodedImages(Protocol):
    """Image files by number, each with its class."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[bytes, int]:
        """Returns the bytes of an image file, and its class. Raises: InvalidDataError."""
        ...

    def name(self, index: int, /) -> str:
        """Returns the file that the image is in, and where in it, for an error's text."""
        ...


class ImagePart:
    """Samples (image, class): uint8 [3, size, size] RGB and an int."""

    def __init__(self, files: EncodedImages, transform: v2.Transform) -> None:
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            content, label = self._files[index]
            image = decode(content)
        except InvalidDataError as error:
            raise InvalidDataError(f"sample {index}, {self._files.name(index)}: {error}") from error
        # always the same layout: convolutions round differently for another
        return self._transform(image).contiguous(), label


class Normalize:
    """Batches (uint8 [N, 3, H, W], classes) to (float32, classes): (pixel / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = ((torch.tensor(t) * PIXEL_MAX).view(1, -1, 1, 1) for t in (mean, std))

    def __call__(self, batch: Any) -> Any:
        x, y = batch
        if self._mean.device != x.device:  # once: a copy to a GPU waits for it
            self._mean, self._std = self._mean.to(x.device), self._std.to(x.device)
        return x.to(torch.float32).sub_(self._mean).div_(self._std), y


def image_dataset(
    train: EncodedImages,
    test: EncodedImages,
    classes: int,
    settings: ImageSettings,
    *,
    skips_bad_samples: bool,
    shards: Shards | None = None,
) -> Dataset:
    """Returns a dataset of image files. Parts must be picklable, or survive a fork."""
    return Dataset(
        train=ImagePart(train, augmented(settings)),
        test=ImagePart(test, centred(settings)),
        shape=Images(channels=3, height=settings.size, width=settings.size, classes=classes),
        prepare=Normalize(settings.mean, settings.std),
        shards=shards,
        skips_bad_samples=skips_bad_samples,
        draws_from_torch_alone=True,  # as torchvision's transforms do
    )


def augmented(settings: ImageSettings) -> v2.Transform:
    """Returns the augmentation of a training image, uint8 [3, H, W] to uint8 [3, size, size]; draws torch's numbers."""
    match settings.augment:
        case RandomResizedCrop() as crop:
            resized = v2.RandomResizedCrop(settings.size, scale=crop.scale, ratio=crop.ratio, antialias=True)
            return v2.Compose([resized, v2.RandomHorizontalFlip(crop.flip)])
        case PadCrop() as crop:
            padded = v2.RandomCrop(settings.size, padding=crop.padding)
            return v2.Compose([*_centre(settings), padded, v2.RandomHorizontalFlip(crop.flip)])
        case NoAugment():
            return centred(settings)


def centred(settings: ImageSettings) -> v2.Transform:
    """Returns the transform of a test image, uint8 [3, H, W] to the middle of it, uint8 [3, size, size]."""
    return v2.Compose(_centre(settings))


def decode(content: bytes) -> Tensor:
    """Returns the image of a file, upright: uint8 [3, H, W] RGB, its channels last in memory.

    Grey, CMYK and palette images become RGB; transparency is dropped. Raises: InvalidDataError.
    """
    if simplejpeg is not None and _is_plain_jpeg(content):
        # a fault that libjpeg notices is left to Pillow, which says what it is, and forgives small ones
        with contextlib.suppress(ValueError):
            return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
    return _decode_by_pillow(content)


def _centre(settings: ImageSettings) -> list[v2.Transform]:
    return [v2.Resize(settings.shorter_side, antialias=True), v2.CenterCrop(settings.size)]


def _is_plain_jpeg(content: bytes) -> bool:
    """Returns whether it is a JPEG file, grey or coloured but not CMYK, and not turned by its EXIF."""
    if not content.startswith(SOI):
        return False
    at = len(SOI)
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == SOS:
            break
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in SOF and content[at + 9] > 3:
            return False
        if marker == APP1 and content[at + 4 : at + 10] == b"Exif\0\0" and not _is_upright(content):
            return False
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return True


def _is_upright(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return bool(image.getexif().get(EXIF_ORIENTATION, UPRIGHT) == UPRIGHT)
    except Exception:  # noqa: BLE001 - a damaged EXIF may raise anything; the pixels may be whole
        return True


def _decode_by_pillow(content: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image)
            return torch.from_numpy(np.array(_rgb(upright))).permute(2, 0, 1)
    except InvalidDataError:
        raise
    except Exception as error:  # Pillow's readers raise anything for a damaged file
        about = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise InvalidDataError(f"the image can't be decoded: {about} ({len(content)} bytes)") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InvalidDataError(f"an image of mode {image.mode} has no 8-bit colours; convert it to RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")

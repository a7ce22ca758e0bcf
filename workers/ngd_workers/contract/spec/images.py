"""From an image file to the pixels that a model sees: the settings that every source of image files shares."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ngd_workers.contract.spec.base import SpecModel, list_to_tuple

__all__ = ["Augment", "ImageSettings", "NoAugment", "OnBadSample", "PadCrop", "RandomResizedCrop"]

MAX_SIDE = 8192
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_tuple: Any = BeforeValidator(list_to_tuple)

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Flip = Annotated[float, Field(ge=0, le=1, description="Probability that a training image is mirrored left to right.")]
OnBadSample = Annotated[
    Literal["raise", "skip"],
    Field(description="raise: an image that can't be read ends the job; skip: it is left out and counted."),
]


class RandomResizedCrop(SpecModel):
    """A random part of the image, of random shape, scaled to size x size: ImageNet's usual augmentation."""

    kind: Literal["random_resized_crop"] = "random_resized_crop"
    scale: Annotated[tuple[float, float], _tuple, Field(description="Bounds of the part's share of the area.")] = (
        0.08,
        1.0,
    )
    ratio: Annotated[tuple[float, float], _tuple, Field(description="Bounds of the part's width over its height.")] = (
        3 / 4,
        4 / 3,
    )
    flip: Flip = 0.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two ordered shares in (0, 1], got {list(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two ordered numbers above 0, got {list(self.ratio)}")
        return self


class PadCrop(SpecModel):
    """The image with a black border, then a random part of size x size: the usual augmentation of 32x32 images."""

    kind: Literal["pad_crop"] = "pad_crop"
    padding: int = Field(default=4, ge=1, le=MAX_SIDE, description="Pixels of the border on each side.")
    flip: Flip = 0.5


class NoAugment(SpecModel):
    """Training images are treated as test images are."""

    kind: Literal["none"] = "none"


Augment = Annotated[RandomResizedCrop | PadCrop | NoAugment, Field(discriminator="kind")]


class ImageSettings(SpecModel):
    """The pixels that a model sees of an image file. Test images are scaled, and their centre is taken."""

    size: Side = Field(default=224, description="Height and width of the model's input, in pixels.")
    resize: Side | None = Field(
        default=None,
        description="Shorter side of a test image before its centre is taken, in pixels; None: size * 8 / 7 with "
        "random_resized_crop (256 for 224), otherwise size.",
    )
    augment: Augment = RandomResizedCrop()
    mean: Annotated[
        tuple[float, float, float],
        _tuple,
        Field(description="Subtracted from red, green and blue, which are in [0, 1]; ImageNet's by default."),
    ] = IMAGENET_MEAN
    std: Annotated[
        tuple[float, float, float], _tuple, Field(description="Divisors of red, green and blue, after the mean.")
    ] = IMAGENET_STD

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize must be at least size ({self.size}), got {self.resize}; raise it or leave it out")
        if min(self.std) <= 0:
            raise ValueError(f"std must be three numbers above 0, got {list(self.std)}")
        return self

    @property
    def shorter_side(self) -> int:
        """Pixels of a test image's shorter side before its centre is taken."""
        if self.resize is not None:
            return self.resize
        return self.size * 8 // 7 if isinstance(self.augment, RandomResizedCrop) else self.size

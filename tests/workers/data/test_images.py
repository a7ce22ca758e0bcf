"""Decoding and preparing of image files."""

import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ngd_workers.contract.errors import InvalidDataError
from ngd_workers.contract.spec import ImageSettings
from ngd_workers.data import images
from ngd_workers.data.images import ImagePart, Normalize, augmented, centred, decode, image_dataset
from tests.support.picture_files import encoded, picture


@pytest.fixture(params=["simplejpeg", "pillow"])
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(images, "simplejpeg", None)


def by_pillow(content: bytes) -> Tensor:
    """Returns what a reader who knows nothing of orientation sees."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_any_colours_becomes_rgb(mode: str) -> None:
    content = picture(1, mode, quality=95)

    image = decode(content)

    assert image.dtype == torch.uint8
    assert image.shape == (3, 16, 24)
    assert apart(image, by_pillow(content)) < 1.0  # decoders may round differently


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = picture(2, exif=exif, quality=95)
    stored = by_pillow(content)
    upright = {
        1: stored,
        2: stored.flip(2),
        3: stored.rot90(2, (1, 2)),
        4: stored.flip(1),
        5: stored.transpose(1, 2),
        6: stored.rot90(-1, (1, 2)),
        7: stored.transpose(1, 2).rot90(2, (1, 2)),
        8: stored.rot90(1, (1, 2)),
    }[orientation]

    assert apart(decode(content), upright) < 1.0


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "gif", "tiff"])
def test_other_formats_are_read(kind: str) -> None:
    content = picture(3, kind=kind)

    assert apart(decode(content), by_pillow(content)) == 0


def test_palette_and_transparency_are_dropped_and_16_bits_scaled() -> None:
    see_through = Image.open(io.BytesIO(picture(4, "RGBA", kind="png")))
    palette = see_through.convert("P")
    palette.info["transparency"] = bytes(range(256))
    deep = Image.fromarray(np.full((5, 4), 0x80FF, dtype=np.uint16))

    assert apart(decode(encoded(see_through, "png")), by_pillow(picture(4, "RGBA", kind="png"))) == 0
    assert decode(encoded(palette, "png")).shape == (3, 16, 24)
    assert decode(encoded(deep, "png")).unique().tolist() == [0x80]


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize(
    "content",
    [b"", b"no image", picture(5)[:200], picture(5)[:12], picture(6, kind="png")[:90], b"\xff\xd8\xff"],
    ids=["empty", "text", "cut jpeg", "cut header", "cut png", "two markers"],
)
def test_damaged_image_is_invalid_data(content: bytes) -> None:
    with pytest.raises(InvalidDataError, match="can't be decoded"):
        decode(content)


def test_image_without_colours_is_refused() -> None:
    with pytest.raises(InvalidDataError, match="mode F"):
        decode(encoded(Image.new("F", (4, 4)), "tiff"))


class Files:
    """Encoded images in memory."""

    def __init__(self, *contents: bytes) -> None:
        self._contents = contents

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self._contents[index], index % 2

    def name(self, index: int) -> str:
        return f"file-{index}.jpg"


@pytest.mark.parametrize("augment", ["random_resized_crop", "pad_crop", "none"])
def test_every_sample_has_the_size_and_layout_that_was_asked_for(augment: str) -> None:
    settings = ImageSettings.model_validate({"size": 8, "augment": {"kind": augment}})
    dataset = image_dataset(
        Files(picture(7), picture(8, size=(9, 31))), Files(picture(9)), 2, settings, skips_bad_samples=False
    )

    for part in (dataset.train, dataset.test):
        for index in range(len(part)):
            image, label = part[index]
            assert image.dtype == torch.uint8
            assert image.shape == (3, 8, 8)
            assert image.is_contiguous()
            assert label == index % 2
    assert dataset.shape == images.Images(3, 8, 8, 2)


def test_augmentation_draws_from_torch_and_test_images_draw_nothing() -> None:
    settings = ImageSettings(size=8)
    image = decode(picture(10))
    augment, centre = augmented(settings), centred(settings)
    views = [(torch.manual_seed(seed), augment(image))[1] for seed in (1, 2, 1)]
    before = torch.get_rng_state()

    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])
    assert torch.equal(centre(image), centre(image))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", ["random_resized_crop", "pad_crop", "none"])
def test_images_draw_from_torch_alone(augment: str) -> None:
    settings = ImageSettings.model_validate({"size": 8, "augment": {"kind": augment}})
    dataset = image_dataset(Files(picture(7)), Files(picture(8)), 2, settings, skips_bad_samples=False)
    before = random.getstate(), pickle.dumps(np.random.get_state())

    for _ in range(8):
        dataset.train[0]

    assert dataset.draws_from_torch_alone
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before


def test_test_image_is_the_middle_of_the_scaled_image() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, 5:15, 15:25] = 200

    assert centred(ImageSettings(size=10, resize=20))(image).unique().tolist() == [200]
    assert ImageSettings(size=224).shorter_side == 256
    assert ImageSettings.model_validate({"size": 32, "augment": {"kind": "pad_crop"}}).shorter_side == 32


def test_prepare_normalizes_each_colour() -> None:
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)

    normalized, y = Normalize(mean, std)((x, torch.tensor([1, 0])))

    expected = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert normalized.dtype == torch.float32
    assert torch.allclose(normalized.double(), expected, atol=1e-6)
    assert y.tolist() == [1, 0]


def test_bad_sample_is_named_by_its_number_and_file() -> None:
    part = ImagePart(Files(picture(11), picture(12)[:100]), centred(ImageSettings(size=8)))

    with pytest.raises(InvalidDataError, match=r"sample 1, file-1\.jpg: the image can't be decoded: .*100 bytes"):
        part[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 32, "resize": 16}, "resize must be at least size"),
        ({"std": [0.1, 0.0, 0.2]}, "std must be"),
        ({"augment": {"kind": "random_resized_crop", "scale": [0.5, 0.1]}}, "scale must be"),
        ({"augment": {"kind": "random_resized_crop", "ratio": [0, 1]}}, "ratio must be"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSettings.model_validate(settings)

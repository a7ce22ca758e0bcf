"""The models and data of all timings: an MLP and ResNet-20 on real digits; ResNet-50 and ViT-B/16 for a GPU.

Each benchmark draws fresh batches, since the sampling noise between them is what an adaptive schedule responds to.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "batches", "count_parameters", "digits", "mlp", "model_of", "resnet20"]

CLASSES = 10
WRONG_LABELS = 0.1  # keeps the loss, and with it the gradients, from vanishing while the clock runs
PIXEL_NOISE = 0.3  # of the standardised pixels, whose borders are constant in the digits


def mlp() -> nn.Module:
    """Returns 784-512-512-512-10 with bias and ReLU: 0.93 M parameters."""
    widths = [784, 512, 512, 512]
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], CLASSES))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        changes = stride != 1 or inputs != outputs
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = shortcut if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet20(channels: int = 1) -> nn.Module:
    """Returns ResNet-20: 3 stages of 3 blocks with 16, 32 and 64 channels, BatchNorm; 0.27 M."""
    stem = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
    blocks = [Residual(o if k else i, o, 1 if k else s) for i, o, s in stages for k in range(3)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=CLASSES)


def vit_b16() -> nn.Module:
    """Returns timm's ViT-B/16 for 224x224 pixels."""
    from timm import create_model

    return create_model("vit_base_patch16_224", num_classes=CLASSES)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "vit_b16": vit_b16,
}
SIDES = {"mlp": 28, "resnet20": 16}  # pixels; the others read random images of 3 x 224 x 224


def model_of(name: str, seed: int = 0) -> nn.Module:
    """Returns the model of that name with the weights that this seed gives, the same for every optimizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[name]()


def batches(name: str, size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (x, y) batches for the model of that name for ever; equal seeds give equal batches."""
    generator = torch.Generator().manual_seed(seed)
    if name not in SIDES:
        while True:
            yield torch.randn(size, 3, 224, 224, generator=generator), _labels(size, generator)
    x, y = digits(SIDES[name])
    while True:
        picked = torch.randint(len(x), (size,), generator=generator)
        is_wrong = torch.rand(size, generator=generator) < WRONG_LABELS
        noise = PIXEL_NOISE * torch.randn(size, *x.shape[1:], generator=generator)
        yield x[picked] + noise, torch.where(is_wrong, _labels(size, generator), y[picked])


@cache
def digits(side: int) -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's 1,797 digits, standardised and scaled up bilinearly to [1, side, side], and their labels.

    If scikit-learn is not installed, random normal images take their place.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1797, 1, side, side, generator=generator), _labels(1797, generator)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def _labels(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (size,), generator=generator)


def _with_batch(name: str) -> Callable[[int], tuple[nn.Module, Tensor, Tensor]]:
    def make(size: int = 256) -> tuple[nn.Module, Tensor, Tensor]:
        return model_of(name), *next(batches(name, size))

    return make


# (model, x, y) for a batch size: one batch, for callers that need no stream.
MODELS = {name: _with_batch(name) for name in BUILDERS}


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

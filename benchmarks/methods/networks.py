"""The models of the tasks: small enough for hundreds of runs on one core."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods.data import LENGTH, WORDS
from benchmarks.models import Residual
from ngd_workers.contract.spec import EncoderDecoder
from ngd_workers.data import TokenPairs
from ngd_workers.models.encoder_decoder import build

__all__ = ["GPT", "LSTM", "Translator", "ViT", "narrow_resnet18", "strided_cnn"]

SPECIALS = 4  # of a text of pairs: unknown, padding, and both ends


def strided_cnn() -> nn.Module:
    """Returns two strided convolutions and two linear layers, 52 k parameters, for 28x28 in one channel: small enough
    for hundreds of runs on one core.
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=4, padding=2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class GPT(nn.Module):
    """Two blocks of width 64 with four heads, learned positions, for 65 characters: 0.11 M parameters."""

    def __init__(self, tokens: int = 65, width: int = 64, length: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions
        for block in self.blocks:
            h = block(h)
        output: Tensor = self.head(self.norm(h))
        return output


class ViT(nn.Module):
    """Two blocks of width 64 with four heads on the 16 patches of a 28x28 image, and a mean over patches: 0.10 M."""

    def __init__(self, patch: int = 7, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros((28 // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads=4, is_causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT + self.positions
        for block in self.blocks:
            h = block(h)
        output: Tensor = self.head(self.norm(h).mean(1))
        return output


class LSTM(nn.Module):
    """Torch's own LSTM of width 128 between an embedding and a head, for 65 characters: 0.14 M parameters."""

    def __init__(self, tokens: int = 65, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(self.tokens(x))[0])
        return output


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int, is_causal: bool = True) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        n, t, width = h.shape
        q, k, v = self.qkv(self.norms[0](h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        h = h + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        output: Tensor = h + self.mlp(self.norms[1](h))
        return output


def narrow_resnet18() -> nn.Module:
    """Returns ResNet-18 for 32x32 pixels with 16, 32, 64 and 128 channels, a quarter of the usual: 0.70 M."""
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2), (64, 128, 2)]
    blocks = [Residual(o if k else i, o, 1 if k else s) for i, o, s in stages for k in range(2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Translator(nn.Module):
    """One block of width 64 reads the source and one writes the target, of `data.multi30k`: 0.5 M parameters."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        words, length = WORDS + SPECIALS, LENGTH + 2
        shape = TokenPairs(words, words, length, source_padding=1, padding=1, bos=2, eos=3, decode=lambda numbers: "")
        sizes = EncoderDecoder(width=width, heads=4, encoder_layers=1, decoder_layers=1, dropout=0.0)
        self.model = build(sizes, shape)

    def forward(self, x: Tensor) -> Tensor:
        source, target = x.split([LENGTH + 2, LENGTH + 1], dim=1)
        output: Tensor = self.model(source, target)
        return output

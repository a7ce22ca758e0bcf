"""A Transformer for pairs of texts."""

from typing import Any

from torch import Tensor, nn

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import EncoderDecoder
from ngd_workers.data import TokenPairs
from ngd_workers.models.transformer import Block, Embedding, initialize

__all__ = ["build"]

Memory = tuple[Tensor, Tensor]  # the encoded source [N, S, W], and true where it is no padding, [N, 1, 1, S]


class Translator(nn.Module):
    """Sources int64 [N, S] and the first P tokens of targets, int64 [N, P], to logits [N, P, vocabulary].

    `decode(encode(source), target)` is the same as a call, so that a source is encoded once for many targets.
    """

    def __init__(self, choice: EncoderDecoder, shape: TokenPairs) -> None:
        super().__init__()
        width, heads, dropout = choice.width, choice.heads, choice.dropout
        self._padding = shape.source_padding
        self.source_embedding = Embedding(shape.source_vocabulary, shape.length, width, dropout)
        self.encoder = nn.ModuleList(
            Block(width, heads, dropout, is_causal=False) for _ in range(choice.encoder_layers)
        )
        self.source_norm = nn.LayerNorm(width)
        self.embedding = Embedding(shape.vocabulary, shape.length, width, dropout)
        self.decoder = nn.ModuleList(
            Block(width, heads, dropout, is_causal=True, reads_source=True) for _ in range(choice.decoder_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.vocabulary, bias=False)
        initialize(self, 2 * choice.encoder_layers + 3 * choice.decoder_layers)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(self.encode(source), target)

    def encode(self, source: Tensor) -> Memory:
        """Returns what the decoder reads of the sources."""
        readable = (source != self._padding)[:, None, None, :]
        x = self.source_embedding(source)
        for block in self.encoder:
            x = block(x, readable)
        return self.source_norm(x), readable

    def decode(self, memory: Memory, target: Tensor) -> Tensor:
        """Returns the logits after each token of the targets."""
        source, readable = memory
        # Padding of the target lies behind all its tokens, which see nothing of it.
        x = self.embedding(target)
        for block in self.decoder:
            x = block(x, readable, source)
        logits: Tensor = self.head(self.norm(x))
        return logits


def build(choice: EncoderDecoder, shape: Any) -> nn.Module:
    """Returns the model for pairs of texts of this shape. Raises: SpecError."""
    if not isinstance(shape, TokenPairs):
        raise SpecError(f"model encoder_decoder needs pairs of texts, got data of {shape}; choose another model")
    return Translator(choice, shape)

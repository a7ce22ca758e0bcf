"""The parts of our Transformers: modules that optimizer ngd covers, in which padding reaches no other position.

A module that ngd covers measures each row with a gradient. So q, k and v of self-attention come from one layer: the
first position's q has none, for it sees one key alone, and would count in some batches and not in others.

Shapes: N samples, P positions, S positions of the source, H heads, D numbers a head, W = H D the width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Block", "CrossAttention", "Embedding", "FeedForward", "SelfAttention", "initialize"]

INITIAL_STD = 0.02  # GPT-2's
HIDDEN_FACTOR = 4


class Embedding(nn.Module):
    """The sum of a token's vector and of its position's, [N, P, W]."""

    def __init__(self, vocabulary: int, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_NP: Tensor) -> Tensor:
        # One row of positions for each sample, so that the gradient of a sample is its own.
        positions = torch.arange(tokens_NP.shape[1], device=tokens_NP.device).expand(tokens_NP.shape)
        embedded: Tensor = self.dropout(self.token(tokens_NP) + self.position(positions))
        return embedded


class SelfAttention(nn.Module):
    """Attention of each position to itself and those before it if `is_causal`, else to all that `readable` names."""

    def __init__(self, width: int, heads: int, dropout: float, *, is_causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self._heads, self._dropout, self._is_causal = heads, dropout, is_causal

    def forward(self, x: Tensor, readable: Tensor | None = None) -> Tensor:
        q, k, v = (_by_head(part, self._heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self._dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, readable, dropout, is_causal=self._is_causal)
        out: Tensor = self.out(_joined(mixed))
        return out


class CrossAttention(nn.Module):
    """Attention of each position of the target to those of the source that `readable` names."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self._heads, self._dropout = heads, dropout

    def forward(self, x: Tensor, source: Tensor, readable: Tensor) -> Tensor:
        q = _by_head(self.q(x), self._heads)
        k, v = (_by_head(part, self._heads) for part in self.kv(source).chunk(2, dim=-1))
        dropout = self._dropout if self.training else 0.0
        out: Tensor = self.out(_joined(F.scaled_dot_product_attention(q, k, v, readable, dropout)))
        return out


class FeedForward(nn.Module):
    """A hidden layer of four times the width, with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, HIDDEN_FACTOR * width)
        self.activation = nn.GELU()
        self.out = nn.Linear(HIDDEN_FACTOR * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.activation(self.hidden(x)))
        return out


class Block(nn.Module):
    """Self-attention, attention to a source if there is one, and a hidden layer, each added to its normalized input."""

    def __init__(self, width: int, heads: int, dropout: float, *, is_causal: bool, reads_source: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout, is_causal=is_causal)
        if reads_source:
            self.source_norm = nn.LayerNorm(width)
            self.source_attention = CrossAttention(width, heads, dropout)
        self.hidden_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, readable: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """readable: true where a key may be read, [N, 1, 1, S]: keys of `source` if that is given, else of x."""
        x = x + self.dropout(self.attention(self.attention_norm(x), readable if source is None else None))
        if source is not None:
            x = x + self.dropout(self.source_attention(self.source_norm(x), source, readable))
        added: Tensor = x + self.dropout(self.feed_forward(self.hidden_norm(x)))
        return added


def initialize(model: nn.Module, additions: int) -> None:
    """Draws GPT-2's first weights; `additions`: the layers whose outputs add up along the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = name.endswith(".out")
            nn.init.normal_(module.weight, std=INITIAL_STD * (additions**-0.5 if adds else 1.0))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Returns [N, H, P, D] of [N, P, W]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """Returns [N, P, W] of [N, H, P, D]."""
    return x.transpose(1, 2).flatten(2)

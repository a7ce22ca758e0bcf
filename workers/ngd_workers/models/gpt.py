"""A decoder-only Transformer as GPT-2, with a head of its own."""

from typing import Any

from torch import Tensor, nn

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import GPT
from ngd_workers.data import TokenSequences
from ngd_workers.models.transformer import Block, Embedding, initialize

__all__ = ["build"]


class Decoder(nn.Module):
    """Tokens int64 [N, P], P at most `length`, to logits [N, P, vocabulary] of the token after each."""

    def __init__(self, choice: GPT, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, length, choice.width, choice.dropout)
        self.blocks = nn.ModuleList(
            Block(choice.width, choice.heads, choice.dropout, is_causal=True) for _ in range(choice.layers)
        )
        self.norm = nn.LayerNorm(choice.width)
        self.head = nn.Linear(choice.width, vocabulary, bias=False)
        initialize(self, 2 * choice.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def build(choice: GPT, shape: Any) -> nn.Module:
    """Returns the model for texts of this shape. Raises: SpecError."""
    if not isinstance(shape, TokenSequences):
        raise SpecError(f"model gpt needs a text of tokens, got data of {shape}; choose another model")
    return Decoder(choice, shape.vocabulary, shape.length)

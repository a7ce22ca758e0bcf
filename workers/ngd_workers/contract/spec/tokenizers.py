"""How text becomes tokens. Every tokenizer is learned from the training text alone, and is the same on every rank."""

from typing import Annotated, Literal

from pydantic import Field

from ngd_workers.contract.spec.base import SpecModel

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CharacterTokenizer",
    "TokenizerChoice",
    "TokenizerFile",
    "WordTokenizer",
]


class CharacterTokenizer(SpecModel):
    """One token for each character of the training text; others are <unk>."""

    kind: Literal["characters"] = "characters"


class WordTokenizer(SpecModel):
    """One token for each word between white space; words that are not in the vocabulary are <unk>.

    In the source `tokens` each line ends with <eos>, as is usual for the Penn Treebank.
    """

    kind: Literal["words"] = "words"
    max_words: int | None = Field(
        default=None, ge=1, le=2**31, description="The most frequent words of the training text; None: all of them."
    )


class ByteTokenizer(SpecModel):
    """One token for each byte of the text in UTF-8: 256, and none is unknown."""

    kind: Literal["bytes"] = "bytes"


class BPETokenizer(SpecModel):
    """Byte-pair encoding of UTF-8 bytes as in GPT-2, learned from the training text; none is unknown."""

    kind: Literal["bpe"] = "bpe"
    vocabulary: int = Field(
        default=8000, ge=257, le=1_000_000, description="Tokens in all: the 256 bytes, and those merged from them."
    )


class TokenizerFile(SpecModel):
    """A tokenizer.json of Hugging Face's tokenizers or transformers."""

    kind: Literal["file"] = "file"
    path: str = Field(min_length=1, description="The file; a relative path starts at NGD_DATA_DIR or --data-dir.")


TokenizerChoice = Annotated[
    CharacterTokenizer | WordTokenizer | ByteTokenizer | BPETokenizer | TokenizerFile,
    Field(discriminator="kind"),
]

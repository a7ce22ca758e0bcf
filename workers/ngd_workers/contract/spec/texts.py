"""Texts that a job may train on: sources of data, beside those in `sources`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ngd_workers.contract.spec.base import SpecModel
from ngd_workers.contract.spec.tokenizers import BPETokenizer, TokenizerChoice, TokenizerFile

__all__ = ["TextPairs", "Tokens"]


class Tokens(SpecModel):
    """Text for a language model: text files, or files of token numbers, which are mapped into memory and may be larger.

    A sample is `length` tokens and, for each of them, the token that follows it. Sample i begins at token i * length.
    """

    kind: Literal["tokens"] = "tokens"
    train: str = Field(
        min_length=1,
        description="The training text: .npy or .bin with token numbers; any other file is text in UTF-8, gzipped if "
        "its name ends in .gz. A relative path starts at NGD_DATA_DIR or --data-dir.",
    )
    test: str | None = Field(default=None, min_length=1, description="The test text; or give test_fraction.")
    test_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the training file, its end, that is the test text instead."
    )
    length: int = Field(ge=1, le=2**24, description="Tokens of a sample.")
    tokenizer: TokenizerChoice | None = Field(
        default=None, description="For text. For token numbers: the file tokenizer that made them, or None."
    )
    vocabulary: int | None = Field(
        default=None,
        ge=1,
        le=2**31,
        description="Number of different tokens in files of token numbers; None: the tokenizer's.",
    )
    dtype: Literal["uint16", "uint32"] | None = Field(
        default=None, description="Numbers in a .bin file, little-endian; None: uint16. A .npy file says its own."
    )

    @property
    def is_text(self) -> bool:
        """Whether the files hold text, and not token numbers."""
        return not self.train.endswith((".npy", ".bin"))

    @model_validator(mode="after")
    def _files_agree(self) -> Self:
        if (self.test is None) == (self.test_fraction is None):
            raise ValueError(f"give exactly one of test and test_fraction, got {self.test!r} and {self.test_fraction}")
        if self.test is not None and self.test.endswith((".npy", ".bin")) == self.is_text:
            raise ValueError(f"train and test must both be text or both token numbers, got {self.train}, {self.test}")
        return self

    @model_validator(mode="after")
    def _vocabulary_is_set_once(self) -> Self:
        if self.is_text and (self.tokenizer is None or self.vocabulary is not None):
            raise ValueError(
                f"text, {self.train!r}, needs a tokenizer, which decides the vocabulary, got tokenizer "
                f"{self.tokenizer and self.tokenizer.kind} and vocabulary {self.vocabulary}; take "
                f"{{kind: characters}}, say"
            )
        if self.is_text:
            return self
        is_file = isinstance(self.tokenizer, TokenizerFile)
        if (self.tokenizer is not None and not is_file) or is_file == (self.vocabulary is not None):
            raise ValueError(
                f"token numbers, {self.train!r}, need either vocabulary or a tokenizer of kind file, got tokenizer "
                f"{self.tokenizer and self.tokenizer.kind} and vocabulary {self.vocabulary}"
            )
        return self

    @model_validator(mode="after")
    def _dtype_is_read(self) -> Self:
        names = [name for name in (self.train, self.test) if name is not None]
        if self.dtype is not None and not any(name.endswith(".bin") for name in names):
            raise ValueError(f"dtype is for .bin files, got dtype {self.dtype} for {', '.join(names)}; leave it out")
        return self


class TextPairs(SpecModel):
    """Sentences in two languages, in files aligned by line: `<train>.<source>` and `<train>.<target>`, plain or .gz."""

    kind: Literal["text_pairs"] = "text_pairs"
    directory: str = Field(
        min_length=1, description="Folder with the files; a relative path starts at NGD_DATA_DIR or --data-dir."
    )
    train: str = Field(default="train", min_length=1, description="First part of the names of the training files.")
    test: str = Field(default="test", min_length=1, description="First part of the names of the test files.")
    source: str = Field(min_length=1, max_length=40, description="Ending of the source language's files: en.")
    target: str = Field(min_length=1, max_length=40, description="Ending of the target language's files: de.")
    tokenizer: TokenizerChoice = Field(
        default=BPETokenizer(), description="For both languages, learned from both, or for the source language alone."
    )
    target_tokenizer: TokenizerChoice | None = Field(
        default=None, description="For the target language, learned from it alone; None: the one of both languages."
    )
    max_length: int = Field(default=128, ge=1, le=2**20, description="Most tokens of a sentence.")
    longer: Literal["drop", "cut"] = Field(
        default="drop",
        description="Training pairs with a longer sentence are left out, or both sentences are cut. Test sentences are "
        "always cut, and their references never are. How many were is logged.",
    )

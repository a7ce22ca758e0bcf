"""Text for a language model: text files, and files of token numbers that are mapped into memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ngd_workers.contract.errors import InvalidDataError, SpecError
from ngd_workers.contract.spec import Tokens
from ngd_workers.data.base import Dataset, TokenSequences
from ngd_workers.data.tokenizing import TextTokenizer, build_tokenizer, located, read_text, token_type

__all__ = ["MappedTokens", "TokenPart", "load"]

NO_LABEL = -100
END_OF_LINE = "<eos>"


class MappedTokens:
    """Token numbers in a file, from number `first` up to `last`: read as they are needed, never as a whole."""

    def __init__(self, path: Path, dtype: str, first: int = 0, last: int | None = None) -> None:
        self.path, self._dtype = path, dtype
        self._first, self._last = first, last
        self._numbers = self._mapped()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, which: slice) -> np.ndarray:
        numbers: np.ndarray = self._numbers[which]
        return numbers

    def part(self, first: int, last: int | None) -> "MappedTokens":
        """Returns a part of the file."""
        return MappedTokens(self.path, self._dtype, first, last)

    def __getstate__(self) -> dict[str, Any]:  # a pickled mapping would be a copy of the file
        return {name: value for name, value in vars(self).items() if name != "_numbers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._numbers = self._mapped()

    def _mapped(self) -> np.ndarray:
        try:
            if self.path.suffix == ".npy":
                numbers = np.load(self.path, mmap_mode="r")
            else:
                numbers = np.memmap(self.path, dtype=np.dtype(self._dtype).newbyteorder("<"), mode="r")
        except ValueError as error:
            raise InvalidDataError(f"{self.path} holds no {self._dtype} numbers: {error}") from error
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise InvalidDataError(
                f"{self.path} must hold whole numbers in one dimension, got {numbers.dtype} {numbers.shape}"
            )
        part: np.ndarray = numbers[self._first : self._last]
        return part


class TokenPart:
    """Sample i: tokens from i * length up to (i + 1) * length, and the token after each of them, int64 [length].

    keeps_rest: whether the tokens after the last whole sample are one more, filled up with label -100.
    """

    def __init__(
        self, tokens: np.ndarray | MappedTokens, length: int, vocabulary: int, name: str, *, keeps_rest: bool
    ) -> None:
        self._tokens, self._length, self._vocabulary, self._name = tokens, length, vocabulary, name
        whole, rest = divmod(max(len(tokens) - 1, 0), length)
        self._samples = whole + int(keeps_rest and rest > 0)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.batch_of([index])
        return x[0], y[0]

    def batch_of(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the samples of these numbers as one batch, [N, length] both. Raises: InvalidDataError."""
        x = np.zeros((len(indices), self._length), dtype=np.int64)
        y = np.full_like(x, NO_LABEL)
        for row, index in enumerate(indices):
            begin = index * self._length
            piece = self._tokens[begin : begin + self._length + 1]
            x[row, : len(piece) - 1], y[row, : len(piece) - 1] = piece[:-1], piece[1:]
        if max(x.max(), y.max()) >= self._vocabulary or x.min() < 0:
            raise InvalidDataError(
                f"{self._name} must hold tokens in [0, {self._vocabulary}), got {max(x.max(), y.max())} in one of the "
                f"samples {min(indices)} to {max(indices)}; set data.vocabulary or data.dtype"
            )
        return torch.from_numpy(x), torch.from_numpy(y)


Numbers = np.ndarray | MappedTokens


def load(choice: Tokens, data_dir: Path | None) -> Dataset:
    """Returns the two parts of the text. Raises: SpecError, DataNotFoundError, InvalidDataError."""
    train_path = located(choice.train, data_dir, "data.train")
    test_path = train_path if choice.test is None else located(choice.test, data_dir, "data.test")
    train: Numbers
    test: Numbers
    tokenizer = None if choice.is_text or choice.tokenizer is None else _tokenizer(choice, "", data_dir)
    if choice.is_text:
        texts = _texts(choice, train_path, test_path)
        tokenizer = _tokenizer(choice, texts[0], data_dir)
        train, test = (_encoded(text, tokenizer) for text in texts)
    else:
        train, test = _mapped(choice, train_path, test_path)
    vocabulary = choice.vocabulary if tokenizer is None else tokenizer.vocabulary
    assert vocabulary is not None
    for name, path, tokens, needed in (("train", train_path, train, choice.length), ("test", test_path, test, 1)):
        if len(tokens) <= needed:
            raise SpecError(
                f"the {name} text must have more than {needed} tokens, got {len(tokens)} in {path}; change data.length "
                "or data.test_fraction"
            )
    return Dataset(
        TokenPart(train, choice.length, vocabulary, str(train_path), keeps_rest=False),
        TokenPart(test, choice.length, vocabulary, str(test_path), keeps_rest=True),
        TokenSequences(vocabulary, choice.length, decode=None if tokenizer is None else tokenizer.decode),
    )


def _texts(choice: Tokens, train_path: Path, test_path: Path) -> tuple[str, str]:
    text = read_text(train_path)
    return (text, read_text(test_path)) if choice.test_fraction is None else _split_text(text, choice.test_fraction)


def _tokenizer(choice: Tokens, text: str, data_dir: Path | None) -> TextTokenizer:
    assert choice.tokenizer is not None
    specials = [END_OF_LINE] if choice.tokenizer.kind == "words" else []
    return build_tokenizer(choice.tokenizer, lambda: text.splitlines(keepends=True), specials, data_dir)


def _split_text(text: str, test_fraction: float) -> tuple[str, str]:
    """Returns the beginning and the end of the text, cut where a line begins if it has lines."""
    cut = round(len(text) * (1 - test_fraction))
    cut = text.find("\n", cut) + 1 or cut
    return text[:cut], text[cut:]


def _encoded(text: str, tokenizer: TextTokenizer) -> np.ndarray:
    """Returns the tokens of a text, line by line; each ends with its line break, or with <eos>."""
    pieces: Iterable[np.ndarray] = tokenizer.encode(text.splitlines(keepends=True))
    if tokenizer.specials:
        pieces = (np.append(line, np.array(tokenizer.specials, dtype=line.dtype)) for line in pieces)
    return np.concatenate([np.zeros(0, dtype=token_type(tokenizer.vocabulary)), *pieces])


def _mapped(choice: Tokens, train_path: Path, test_path: Path) -> tuple[MappedTokens, MappedTokens]:
    train = MappedTokens(train_path, choice.dtype or "uint16")
    if choice.test_fraction is None:
        return train, MappedTokens(test_path, choice.dtype or "uint16")
    cut = round(len(train) * (1 - choice.test_fraction))
    return train.part(0, cut), train.part(cut, None)

"""Sentences in two languages, from files aligned by line; padded to the longest of each batch."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import TextPairs
from ngd_workers.data.base import Dataset, TokenPairs
from ngd_workers.data.tokenizing import TextTokenizer, build_tokenizer, read_text

__all__ = ["PaddedTo", "PairPart", "load"]

log = logging.getLogger(__name__)

SPECIALS = ("<pad>", "<bos>", "<eos>")
Pair = tuple[np.ndarray, np.ndarray]


class PairPart:
    """Sample i: the token numbers of source and target, int64; of the test part the target's text as well."""

    def __init__(self, pairs: Sequence[Pair], references: Sequence[str] | None = None) -> None:
        self._pairs, self._references = pairs, references

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        source, target = (torch.from_numpy(row.astype(np.int64)) for row in self._pairs[index])
        return (source, target) if self._references is None else (source, target, self._references[index])


class PaddedTo:
    """Makes a batch of samples: both sides padded on the right to the longest sentence; texts become a list."""

    def __init__(self, source_padding: int, padding: int) -> None:
        self._source_padding, self._padding = source_padding, padding

    def __call__(self, samples: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        sources, targets, *texts = zip(*samples, strict=True)
        x, y = _padded(sources, self._source_padding), _padded(targets, self._padding)
        return x, y, *(list(column) for column in texts)


def load(choice: TextPairs, data_dir: Path | None) -> Dataset:
    """Returns the pairs of the training and test files. Raises: DataNotFoundError, InvalidDataError, SpecError."""
    train, test = (_lines(choice, part, data_dir) for part in (choice.train, choice.test))
    source, target = _tokenizers(choice, train, data_dir)
    train_pairs, longer = _kept(_encoded(train, source, target), choice)
    if not train_pairs:
        raise SpecError(f"data.max_length {choice.max_length} leaves no training pair; raise it")
    test_pairs, longer_test = _kept(_encoded(test, source, target), choice.model_copy(update={"longer": "cut"}))
    log.info(
        "%d of %d training pairs and %d of %d test pairs have more than %d tokens in a sentence: %s, and cut",
        *(longer, len(train[0]), longer_test, len(test[0]), choice.max_length),
        {"drop": "left out", "cut": "cut"}[choice.longer],
    )
    padding, bos, eos = target.specials
    return Dataset(
        PairPart(_framed(train_pairs, source, target)),
        PairPart(_framed(test_pairs, source, target), test[1]),
        TokenPairs(
            source_vocabulary=source.vocabulary,
            vocabulary=target.vocabulary,
            length=choice.max_length + 2,
            source_padding=source.specials[0],
            padding=padding,
            bos=bos,
            eos=eos,
            decode=target.decode,
        ),
        collate=PaddedTo(source.specials[0], padding),
    )


def _lines(choice: TextPairs, part: str, data_dir: Path | None) -> tuple[list[str], list[str]]:
    """Returns the source and the target sentences of a part."""
    folder = Path(choice.directory)
    if not folder.is_absolute():
        folder = (data_dir or Path()) / folder
    paths = [_file(folder, f"{part}.{language}") for language in (choice.source, choice.target)]
    sources, targets = (read_text(path).removesuffix("\n").split("\n") for path in paths)
    if len(sources) != len(targets):
        raise InvalidDataError(
            f"{paths[0]} has {len(sources)} lines and {paths[1]} {len(targets)}: the files must be aligned by line"
        )
    return sources, targets


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataNotFoundError(
        f"{folder} holds neither {name} nor {name}.gz; set NGD_DATA_DIR or --data-dir to the folder that holds "
        "data.directory, and data.train, data.test, data.source and data.target to the parts of the files' names"
    )


def _tokenizers(
    choice: TextPairs, train: tuple[list[str], list[str]], data_dir: Path | None
) -> tuple[TextTokenizer, TextTokenizer]:
    sources, targets = train
    if choice.target_tokenizer is None:
        both = build_tokenizer(choice.tokenizer, lambda: [*sources, *targets], SPECIALS, data_dir)
        return both, both
    source = build_tokenizer(choice.tokenizer, lambda: sources, SPECIALS, data_dir)
    return source, build_tokenizer(choice.target_tokenizer, lambda: targets, SPECIALS, data_dir)


def _encoded(lines: tuple[list[str], list[str]], source: TextTokenizer, target: TextTokenizer) -> list[Pair]:
    return list(zip(source.encode(lines[0]), target.encode(lines[1]), strict=True))


def _kept(pairs: list[Pair], choice: TextPairs) -> tuple[list[Pair], int]:
    """Returns the pairs of at most `max_length` tokens a side, the others left out or cut; and how many those were."""
    most = choice.max_length
    short = [pair for pair in pairs if max(map(len, pair)) <= most]
    longer = len(pairs) - len(short)
    return (short if choice.longer == "drop" else [(a[:most], b[:most]) for a, b in pairs]), longer


def _framed(pairs: list[Pair], source: TextTokenizer, target: TextTokenizer) -> list[Pair]:
    """Returns the pairs with <bos> before and <eos> after each sentence."""

    def framed(row: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
        _, bos, eos = tokenizer.specials
        return np.concatenate([[bos], row, [eos]]).astype(row.dtype)

    return [(framed(a, source), framed(b, target)) for a, b in pairs]


def _padded(rows: Sequence[Tensor], padding: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)

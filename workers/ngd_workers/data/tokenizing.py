"""Tokenizers by name, of the library `tokenizers`, and the files of text that they read."""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import BPETokenizer, TokenizerChoice, TokenizerFile, WordTokenizer

__all__ = ["TextTokenizer", "build_tokenizer", "located", "read_text", "token_type"]

UNKNOWN = "<unk>"
# Characters in whose UTF-8 each byte occurs that may occur in UTF-8.
EVERY_BYTE = "".join(
    map(chr, [*range(0x800), 0x800, *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x30000)])
)
LINES_AT_ONCE = 10_000  # a token's record in the library takes some 100 bytes until it is a number


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a text of which each is a token of its own, so that a table gives the token of each.

    codes: returns the number of each unit of a text, such as its code point. known: a text of all units that are known.
    """

    codes: Callable[[str], np.ndarray]
    known: str


class TextTokenizer:
    """Texts to token numbers and back. `specials` are the numbers of the special tokens that were asked for.

    units: of a tokenizer that has them; then texts go by a table, many times as fast as through the library.
    """

    def __init__(self, tokenizer: Tokenizer, specials: Sequence[str], units: Units | None = None) -> None:
        tokenizer.add_special_tokens(list(specials))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "<eos>" in a text is text
        self._tokenizer = tokenizer
        numbers = tokenizer.get_vocab(with_added_tokens=True)
        self.specials = [numbers[name] for name in specials]
        self.vocabulary: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self._units = units
        self._table = None if units is None else self._tabled(units)

    def encode(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the token numbers of each text, without special tokens: uint16, or uint32 for a large vocabulary."""
        if self._units is not None and self._table is not None:
            for text in texts:
                yield self._table[np.minimum(self._units.codes(text), len(self._table) - 1)]
            return
        dtype, batch = token_type(self.vocabulary), list[str]()
        for text in texts:
            batch.append(text)
            if len(batch) == LINES_AT_ONCE:
                yield from self._encoded(batch, dtype)
                batch = []
        yield from self._encoded(batch, dtype)

    def decode(self, numbers: Sequence[int]) -> str:
        """Returns the text of token numbers; special tokens are left out."""
        text: str = self._tokenizer.decode([n for n in numbers if n not in self.specials], skip_special_tokens=False)
        return text

    def _tabled(self, units: Units) -> np.ndarray:
        """Returns the token of each unit by its code, as the library has it; the last one is of unknown units."""
        (numbers,) = self._encoded([units.known], token_type(self.vocabulary))
        codes = units.codes(units.known)
        unknown = self._tokenizer.token_to_id(UNKNOWN) or 0
        table = np.full(int(codes.max(initial=0)) + 2, unknown, dtype=numbers.dtype)
        table[codes] = numbers
        return table

    def _encoded(self, texts: list[str], dtype: type[np.unsignedinteger[Any]]) -> Iterator[np.ndarray]:
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=dtype)


def build_tokenizer(
    choice: TokenizerChoice, texts: Callable[[], Iterable[str]], specials: Sequence[str], data_dir: Path | None
) -> TextTokenizer:
    """Returns the tokenizer, learned from what `texts` returns: the same for the same texts.

    Raises: SpecError, DataNotFoundError, InvalidDataError.
    """
    if isinstance(choice, TokenizerFile):
        return TextTokenizer(_from_file(located(choice.path, data_dir, "tokenizer.path")), specials)
    tokenizer = _learned(choice, texts)
    return TextTokenizer(tokenizer, specials, _units(choice, tokenizer))


def read_text(path: Path) -> str:
    """Returns the text of a file, gzipped if its name ends in .gz. Raises: InvalidDataError."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidDataError(f"{path} is not a whole gzip file: {error}; get it again") from error
    except UnicodeDecodeError as error:
        raise InvalidDataError(f"{path} is no text in UTF-8: {error}; convert it") from error
    if not text:
        raise InvalidDataError(f"{path} is empty")
    return text


def located(name: str, data_dir: Path | None, field: str) -> Path:
    """Returns the path of a file of the data. Raises: DataNotFoundError."""
    path = Path(name)
    if not path.is_absolute():
        path = (data_dir or Path()) / path
    if not path.is_file():
        raise DataNotFoundError(
            f"no file {path} ({field} is {name!r}); set NGD_DATA_DIR or --data-dir to the folder that holds it, or "
            "give an absolute path"
        )
    return path


def token_type(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    """Returns the smallest dtype of token numbers below `vocabulary`."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise InvalidDataError(f"{path} is no tokenizer.json: {error}; save it by the library tokenizers") from error


def _learned(choice: TokenizerChoice, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    match choice.kind:
        case "characters":
            counts = Counter(character for text in texts() for character in text)
            tokenizer = _of_pieces(sorted(counts))
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
        case "words":
            assert isinstance(choice, WordTokenizer)
            words = Counter(word for text in texts() for word in text.split())
            ranked = sorted(words, key=lambda word: (-words[word], word))
            tokenizer = _of_pieces(ranked[: choice.max_words])
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        case "bytes":
            tokenizer = _of_pieces(sorted(pre_tokenizers.ByteLevel.alphabet()), unknown=False)
            each = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_bytes(use_regex=False), each])
            tokenizer.decoder = decoders.ByteLevel()
        case _:
            assert isinstance(choice, BPETokenizer)
            tokenizer = _byte_pairs(choice, texts)
    return tokenizer


def _units(choice: TokenizerChoice, tokenizer: Tokenizer) -> Units | None:
    match choice.kind:
        case "characters":
            return Units(_code_points, "".join(name for name in tokenizer.get_vocab() if len(name) == 1))
        case "bytes":
            return Units(_utf8, EVERY_BYTE)
    return None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _of_pieces(pieces: Sequence[str], *, unknown: bool = True) -> Tokenizer:
    """Returns a tokenizer whose vocabulary are these pieces and, unless every text has pieces alone, <unk>."""
    names = dict.fromkeys([UNKNOWN, *pieces] if unknown else pieces)
    return Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=UNKNOWN))


def _byte_pairs(choice: BPETokenizer, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _bytes(use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=choice.vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if (size := tokenizer.get_vocab_size()) < choice.vocabulary:
        raise SpecError(
            f"tokenizer.vocabulary must be at most the {size} tokens that the training text gives, got "
            f"{choice.vocabulary}; lower it"
        )
    return tokenizer


def _bytes(*, use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)

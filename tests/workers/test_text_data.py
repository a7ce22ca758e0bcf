"""Tokenizers, texts and pairs of texts: what a sample is, what a text becomes, and bad files."""

import gzip
import logging
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ngd_workers.contract.errors import DataNotFoundError, InvalidDataError, SpecError
from ngd_workers.contract.spec import TextPairs, TokenizerChoice, Tokens
from ngd_workers.data import Dataset, Fetches, load_dataset
from ngd_workers.data.tokenizing import TextTokenizer, build_tokenizer
from tests.support.texts import sentences, write_pairs, write_text, write_token_numbers

LINES = [f"{line}\n" for line in sentences(60)]
KINDS = {
    "characters": {"kind": "characters"},
    "words": {"kind": "words"},
    "bytes": {"kind": "bytes"},
    "bpe": {"kind": "bpe", "vocabulary": 280},
}


def tokenizer(choice: dict[str, object], specials: tuple[str, ...] = ()) -> TextTokenizer:
    parsed = TypeAdapter(TokenizerChoice).validate_python(choice)
    return build_tokenizer(parsed, lambda: LINES, specials, None)


def tokens(folder: Path, **changes: object) -> Dataset:
    given = {"train": "t.txt", "test_fraction": 0.25, "length": 5, "tokenizer": KINDS["characters"]} | changes
    return load_dataset(Tokens.model_validate(given), folder)


def pairs(folder: Path, **changes: object) -> Dataset:
    given = {"directory": "pairs", "source": "en", "target": "de", "tokenizer": KINDS["characters"]} | changes
    return load_dataset(TextPairs.model_validate(given), folder)


def labels(part: Fetches) -> list[int]:
    """Returns the first token, and the token after each of the part's tokens."""
    x, y = part.batch_of(range(len(part)))
    return [int(x[0, 0]), *y[y != -100].tolist()]


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe"])
def test_text_comes_back_from_its_tokens(kind):
    made = tokenizer(KINDS[kind], ("<pad>", "<eos>"))

    (numbers,) = made.encode(["".join(LINES)])

    assert made.decode([made.specials[0], *numbers.tolist(), *made.specials]) == "".join(LINES)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_of_a_text_is_always_the_same(kind):
    first, second = (tokenizer(KINDS[kind], ("<eos>",)) for _ in range(2))

    assert first.vocabulary == second.vocabulary
    assert all(map(np.array_equal, first.encode(LINES), second.encode(LINES)))


@pytest.mark.parametrize("kind", ["characters", "bytes"])
@pytest.mark.parametrize("specials", [(), ("<pad>", "<eos>")])
def test_table_gives_the_tokens_of_the_library(kind, specials):
    made = tokenizer(KINDS[kind], specials)
    lines = [*LINES, "", "\r\n", "é\u0301 ß 字 😀 <eos> \x00 \U0010ffff zoo"]
    lines += [chr(code) for code in [*range(0x900), *range(0x1000, 0x110000, 0x333)] if not 0xD800 <= code < 0xE000]

    by_library = made._encoded(lines, np.uint16)

    for line, numbers, expected in zip(lines, made.encode(lines), by_library, strict=True):
        assert numbers.dtype == np.uint16
        assert numbers.tolist() == expected.tolist(), repr(line)


def test_large_text_of_characters_takes_little_time():
    made, text = tokenizer(KINDS["characters"]), "".join(LINES) * 1000
    begun_s = time.process_time()

    (numbers,) = made.encode([text])

    assert len(numbers) == len(text) > 1_000_000
    assert time.process_time() - begun_s < 0.3  # the library takes 0.8 for a million, the table 0.01


def test_words_beyond_the_most_frequent_and_unseen_characters_are_unknown():
    words = tokenizer({"kind": "words", "max_words": 3})
    characters = tokenizer(KINDS["characters"])

    assert words.vocabulary == 4
    assert words.decode(next(words.encode(["nowhere"])).tolist()) == "<unk>"
    assert characters.decode(next(characters.encode(["the zoo"])).tolist()) == "the <unk>oo"


def test_special_token_in_a_text_is_text():
    made = tokenizer(KINDS["bytes"], ("<eos>",))

    (numbers,) = made.encode(["a<eos>"])

    assert len(numbers) == 6
    assert made.specials[0] not in numbers


def test_vocabulary_that_the_text_does_not_give_is_refused():
    with pytest.raises(SpecError, match=r"tokenizer.vocabulary must be at most the \d+ tokens .* got 5000; lower it"):
        tokenizer({"kind": "bpe", "vocabulary": 5000})


def test_saved_tokenizer_is_that_of_the_file(tmp_path):
    made = tokenizer(KINDS["bpe"])
    made._tokenizer.save(str(tmp_path / "tokenizer.json"))

    again = build_tokenizer(
        TypeAdapter(TokenizerChoice).validate_python({"kind": "file", "path": "tokenizer.json"}), list, (), tmp_path
    )

    assert all(map(np.array_equal, again.encode(LINES), made.encode(LINES)))


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
def test_samples_follow_each_other_and_every_test_token_counts(tmp_path, name):
    text = "".join(LINES)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())

    dataset = tokens(tmp_path, train=name)

    train, test = (dataset.shape.decode(labels(part)) for part in (dataset.train, dataset.test))
    assert text.startswith(train)
    assert text.endswith(test)
    assert 0 <= len(text) - len(train) - len(test) < 5
    assert test.startswith(text[len(text) - len(test) :].split("\n")[0])
    x, y = dataset.train[2]
    assert (x.shape, x.dtype, y.dtype) == ((5,), torch.int64, torch.int64)
    assert torch.equal(x[1:], y[:-1])


def test_each_line_of_words_ends_with_eos_and_vocabulary_is_that_of_the_training_text(tmp_path):
    (tmp_path / "train.txt").write_text(" a b <unk> \n b b\n")
    (tmp_path / "test.txt").write_text("b c\n")

    dataset = tokens(
        tmp_path, train="train.txt", test="test.txt", test_fraction=None, length=2, tokenizer=KINDS["words"]
    )

    assert dataset.shape.vocabulary == 4  # <unk>, b, a, <eos>
    unk, b, a, eos = range(4)
    assert labels(dataset.train) == [a, b, unk, eos, b, b, eos]
    assert labels(dataset.test) == [b, unk, eos]


@pytest.mark.parametrize(("name", "dtype"), [("t.bin", "uint16"), ("t.bin", "uint32"), ("t.npy", "int64")])
def test_token_numbers_are_mapped_and_not_read(tmp_path, name, dtype):
    numbers = write_token_numbers(tmp_path / name, 1000, 50, dtype)
    given = {"dtype": dtype} if name == "t.bin" else {}

    dataset = tokens(tmp_path, train=name, vocabulary=50, tokenizer=None, length=7, **given)

    assert isinstance(dataset.train._tokens._numbers, np.memmap)
    assert len(pickle.dumps(dataset.train)) < 1000  # another process maps the file itself
    assert labels(pickle.loads(pickle.dumps(dataset.train))) == numbers[:750].tolist()
    assert labels(dataset.test) == numbers[750:].tolist()


def test_token_beyond_the_vocabulary_is_named(tmp_path):
    write_token_numbers(tmp_path / "t.bin", 1000, 50)

    dataset = tokens(tmp_path, train="t.bin", vocabulary=40, tokenizer=None)

    with pytest.raises(InvalidDataError, match=r"t.bin must hold tokens in \[0, 40\), got 4\d in one of the samples 0"):
        dataset.train.batch_of(range(20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": "u.txt"}, "give exactly one of test and test_fraction, got 'u.txt' and 0.25"),
        ({"tokenizer": None}, "text, 't.txt', needs a tokenizer"),
        ({"vocabulary": 10}, "which decides the vocabulary, got tokenizer characters and vocabulary 10"),
        ({"train": "t.bin"}, "token numbers, 't.bin', need either vocabulary or a tokenizer of kind file"),
        ({"train": "t.bin", "test": "u.txt", "test_fraction": None}, "must both be text or both token numbers"),
        ({"dtype": "uint32"}, "dtype is for .bin files, got dtype uint32 for t.txt; leave it out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, changes, message):
    with pytest.raises(ValidationError, match=message):
        tokens(tmp_path, **changes)


def test_bad_texts_say_what_is_wrong(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"no file .*t\.txt \(data.train is 't.txt'\)"):
        tokens(tmp_path)
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidDataError, match=r"t\.txt is no text in UTF-8"):
        tokens(tmp_path)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"a" * 100)[:-9])
    with pytest.raises(InvalidDataError, match=r"t\.txt\.gz is not a whole gzip file"):
        tokens(tmp_path, train="t.txt.gz")
    write_text(tmp_path / "t.txt", 1)
    with pytest.raises(SpecError, match=r"the train text must have more than 500 tokens, got \d+"):
        tokens(tmp_path, length=500)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidDataError, match=r"tokenizer\.json is no tokenizer.json"):
        tokens(tmp_path, tokenizer={"kind": "file", "path": "tokenizer.json"})


@pytest.mark.parametrize("separate", [False, True])
def test_pairs_run_from_bos_to_eos_and_are_padded_to_the_longest_of_the_batch(tmp_path, separate):
    write_pairs(tmp_path / "pairs", "train", 40)
    references = write_pairs(tmp_path / "pairs", "test", 8, seed=1)
    given = {"target_tokenizer": KINDS["bytes"]} if separate else {}

    dataset = pairs(tmp_path, **given)
    x, y, texts = dataset.collate([dataset.test[index] for index in range(8)])

    shape = dataset.shape
    assert (shape.vocabulary == 259) == separate
    assert texts == references
    assert [shape.decode([n for n in row if n != shape.padding]) for row in y.tolist()] == references
    assert set(y[:, 0].tolist()) == {shape.bos}
    for rows, padding in ((x, shape.source_padding), (y, shape.padding)):
        lengths = (rows != padding).sum(1)
        assert int(lengths.max()) == rows.shape[1]
        assert all((row[:length] != padding).all() for row, length in zip(rows, lengths, strict=True))
    ends = y.gather(1, (y != shape.padding).sum(1, keepdim=True) - 1)
    assert set(ends.flatten().tolist()) == {shape.eos}


@pytest.mark.parametrize("longer", ["drop", "cut"])
def test_longer_pairs_are_dropped_or_cut_and_counted(tmp_path, caplog, longer):
    write_pairs(tmp_path / "pairs", "train", 40)
    references = write_pairs(tmp_path / "pairs", "test", 8, seed=1)
    long = sum(len(line.split()) > 4 for line in sentences(40))

    with caplog.at_level(logging.INFO, logger="ngd_workers.data.text_pairs"):
        dataset = pairs(tmp_path, tokenizer=KINDS["words"], max_length=4, longer=longer)

    assert len(dataset.train) == (40 - long if longer == "drop" else 40)
    longest = max(len(row) for index in range(len(dataset.train)) for row in dataset.train[index])
    assert longest <= 6  # with bos and eos
    assert [dataset.test[index][2] for index in range(8)] == references
    assert f"{long} of 40 training pairs and " in caplog.text


def test_pairs_that_are_not_aligned_and_files_that_are_missing_are_named(tmp_path):
    write_pairs(tmp_path / "pairs", "train", 40)
    with pytest.raises(DataNotFoundError, match=r"pairs holds neither test\.en nor test\.en\.gz"):
        pairs(tmp_path)
    (tmp_path / "pairs" / "test.en").write_text("a\nb\n")
    (tmp_path / "pairs" / "test.de").write_text("a\n")
    with pytest.raises(InvalidDataError, match=r"test\.en has 2 lines and .*test\.de 1: the files must be aligned"):
        pairs(tmp_path)

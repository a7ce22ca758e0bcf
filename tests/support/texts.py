"""Small texts of the forms that the text sources read."""

import random
from pathlib import Path

import numpy as np

__all__ = ["WORDS", "sentences", "write_pairs", "write_text", "write_token_numbers"]

WORDS = ["the", "cat", "dog", "sees", "a", "bird", "über", "und", "runs", "<unk>"]


def sentences(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    """Returns lines of words, of 1 to `longest` words each."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(1, longest))) for _ in range(count)]


def write_text(path: Path, lines: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in sentences(lines, seed)))
    return path


def write_token_numbers(path: Path, count: int, vocabulary: int, dtype: str = "uint16") -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0).integers(0, vocabulary, count).astype(dtype)
    np.save(path, numbers) if path.suffix == ".npy" else numbers.tofile(path)
    return numbers


def write_pairs(folder: Path, name: str, count: int, seed: int = 0) -> list[str]:
    """Writes <name>.en and <name>.de, whose lines are those of .en in reverse order of words; returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sentences(count, seed)
    targets = [" ".join(reversed(line.split())) for line in sources]
    for language, lines in (("en", sources), ("de", targets)):
        (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines))
    return targets

"""Small data sets in each form that a source reads, written into a folder."""

import random
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

__all__ = ["write_idx", "write_image_folder", "write_jpeg_npz", "write_pairs", "write_table", "write_text"]

CLASSES = ("cat", "dog")
WORDS = {"a": "ein", "dog": "Hund", "cat": "Kater", "sees": "sieht", "the": "den", "bird": "Vogel", "small": "kleinen"}


def picture(number: int, side: int = 16) -> Image.Image:
    """Returns noise that is darker or lighter by class."""
    noise = np.random.default_rng(number).integers(0, 100, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(noise + np.uint8(120 * (number % 2)))


def write_image_folder(folder: Path, train: int = 32, test: int = 8, side: int = 16) -> Path:
    """Writes <folder>/{train,val}/{cat,dog}/<number>.jpg."""
    for part, count in (("train", train), ("val", test)):
        for number in range(count):
            place = folder / part / CLASSES[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            picture(number, side).save(place / f"{number:04d}.jpg", quality=90)
    return folder


def write_idx(folder: Path, train: int = 32, test: int = 8) -> Path:
    """Writes the four files of an IDX data set of 8x8 images."""
    folder.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = bytes(number % 2 * 200 for number in range(count) for _ in range(64))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, count, 8, 8) + pixels)
        labels = bytes(number % 2 for number in range(count))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels)
    return folder


def write_jpeg_npz(file: Path, samples: int = 40, side: int = 16) -> Path:
    """Writes JPEG files in one .npz, with an empty common header."""
    import io

    bodies = []
    for number in range(samples):
        buffer = io.BytesIO()
        picture(number, side).save(buffer, "JPEG")
        bodies.append(np.frombuffer(buffer.getvalue(), np.uint8))
    np.savez(
        file,
        header=np.empty(0, np.uint8),
        body=np.concatenate(bodies),
        offsets=np.cumsum([0, *map(len, bodies)]),
        labels=np.arange(samples) % 2,
    )
    return file


def write_table(folder: Path, rows: int = 48) -> Path:
    """Writes train.parquet, test.parquet, and both in saved/ as a DatasetDict: two numbers x, their class and sum."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    x = torch.randn(rows, 2).tolist()
    columns = {"x": x, "class": [int(a > b) for a, b in x], "sum": [a + b for a, b in x]}
    parts = {"train": slice(0, rows - 16), "test": slice(rows - 16, rows)}
    tables = {part: {name: values[where] for name, values in columns.items()} for part, where in parts.items()}
    for part, table in tables.items():
        pq.write_table(pa.table(table), folder / f"{part}.parquet", row_group_size=8)
    made = datasets.DatasetDict({part: datasets.Dataset.from_dict(table) for part, table in tables.items()})
    made.save_to_disk(str(folder / "saved"))
    return folder


def write_text(file: Path, words: int = 2000) -> Path:
    """Writes sentences of few words."""
    chooser = random.Random(0)
    file.write_text("".join(chooser.choice(list(WORDS)) + (" " if n % 7 else "\n") for n in range(1, words)))
    return file


def write_pairs(folder: Path, train: int = 64, test: int = 16) -> Path:
    """Writes {train,test}.{en,de}: sentences and their word-by-word translation."""
    folder.mkdir(parents=True)
    chooser = random.Random(0)
    for part, count in (("train", train), ("test", test)):
        sentences = [[chooser.choice(list(WORDS)) for _ in range(chooser.randint(2, 6))] for _ in range(count)]
        (folder / f"{part}.en").write_text("".join(" ".join(words) + "\n" for words in sentences))
        (folder / f"{part}.de").write_text("".join(" ".join(WORDS[w] for w in words) + "\n" for words in sentences))
    return folder

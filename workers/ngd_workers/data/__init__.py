"""Data by name. Start at `load_dataset`; `base` has the contract.

A new source is a file here, a line in SOURCES and a class in contract/spec/sources.py. Imports without torch, so that a
name can be checked where torch is not installed.
"""

from pathlib import Path

from ngd_workers.contract.errors import InvalidDataError, UserCodeError
from ngd_workers.contract.spec import DataChoice, UserData
from ngd_workers.data.base import Dataset, Fetches, Images, Part, Shards, TokenPairs, TokenSequences, Vectors
from ngd_workers.functions import call_user, load_function

__all__ = [
    "SOURCES",
    "Dataset",
    "Fetches",
    "Images",
    "Part",
    "Shards",
    "TokenPairs",
    "TokenSequences",
    "Vectors",
    "load_dataset",
]

SOURCES: dict[str, str] = {
    "digits": "ngd_workers.data.digits:load",
    "idx": "ngd_workers.data.idx:load",
    "jpeg_npz": "ngd_workers.data.jpeg_npz:load",
    "parquet": "ngd_workers.data.parquet:load",
    "huggingface": "ngd_workers.data.huggingface:load",
    "image_folder": "ngd_workers.data.image_folder:load",
    "webdataset": "ngd_workers.data.webdataset:load",
    "tokens": "ngd_workers.data.tokens:load",
    "text_pairs": "ngd_workers.data.text_pairs:load",
}


def load_dataset(choice: DataChoice, data_dir: Path | None) -> Dataset:
    """Returns the data, the same on every rank. Raises: one of the WorkerErrors about data."""
    if not isinstance(choice, UserData):
        dataset: Dataset = load_function(SOURCES[choice.kind])(choice, data_dir)
    else:
        dataset = _of_user(choice)
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        if len(part) == 0:
            raise InvalidDataError(f"the {name} part of data {choice.kind} is empty; check its options")
    return dataset


def _of_user(choice: UserData) -> Dataset:
    made = call_user(choice.function, **choice.options)
    match made:
        case Dataset():
            return made
        case (Part() as train, Part() as test):
            return Dataset(train, test)
    raise UserCodeError(
        f"{choice.function!r} must return a ngd_workers.data.Dataset, or a pair of map-style datasets (train, test), "
        f"got {type(made).__name__}"
    )

"""The contract of data: two map-style parts, and what a model must know of their samples. Imports without torch.

Which samples make a global batch is a pure function of (seed, epoch, step); see `ngd_workers.train.batches`. So a part
needs `__len__` and `__getitem__` alone, as torch's map-style datasets have them. A part that can fetch many samples at
once as one batch has `batch_of(indices)` as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

__all__ = ["Dataset", "Fetches", "Images", "Part", "Shards", "TokenPairs", "TokenSequences", "Vectors"]


@runtime_checkable
class Part(Protocol):
    """Samples by number. A user's torch dataset is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Fetches(Protocol):
    """A part that makes a whole batch itself, where that is faster than sample by sample; it draws no random number."""

    def __len__(self) -> int: ...
    def batch_of(self, indices: Sequence[int], /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Images:
    """Images [channels, height, width], each of one of `classes` classes."""

    channels: int
    height: int
    width: int
    classes: int

    @property
    def outputs(self) -> int:
        """The numbers that a model gives for each image, or for each pixel."""
        return self.classes


@dataclass(frozen=True, slots=True)
class Vectors:
    """Rows of `width` numbers, each with a class of `outputs` ones, or with `outputs` numbers to predict."""

    width: int
    outputs: int


@dataclass(frozen=True, slots=True)
class TokenSequences:
    """Batches (x, y), int64 [N, length] both: tokens in [0, vocabulary), and the token after each; -100: none.

    varies: whether training samples may lack a following token at some positions. Test samples may in any case.
    decode: makes text of token numbers; None: not known.
    """

    vocabulary: int
    length: int
    varies: bool = False
    decode: Callable[[Sequence[int]], str] | None = field(default=None, repr=False, compare=False)

    @property
    def outputs(self) -> int:
        """The numbers that a model gives for each position."""
        return self.vocabulary


@dataclass(frozen=True, slots=True)
class TokenPairs:
    """Batches (x, y): sources int64 [N, S] and targets int64 [N, T], each from bos to eos and then padded on the right.

    Test batches are (x, y, references): the references are a list of the target texts as they are in the file.

    source_vocabulary, source_padding: of the source. vocabulary, padding, bos, eos: of the target.
    length: most tokens of a row, bos and eos among them.
    decode: makes text of the target's token numbers.
    """

    source_vocabulary: int
    vocabulary: int
    length: int
    source_padding: int
    padding: int
    bos: int
    eos: int
    decode: Callable[[Sequence[int]], str] = field(repr=False, compare=False)

    @property
    def outputs(self) -> int:
        """The numbers that a model gives for each position of the target."""
        return self.vocabulary


@dataclass(frozen=True, slots=True)
class Shards:
    """Training samples that lie in files, one file after the other: neighbours are cheap to read together.

    sizes: samples in each file. lanes, window (in files): see `ngd_workers.train.batches`; None: as many lanes as there
        are files, or the next fewer that divide the global batch.
    """

    sizes: tuple[int, ...]
    lanes: int | None = None
    window: int = 4


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a job trains on, and is tested on.

    train, test: samples by number. Each sample is read by `part[i]` under random numbers seeded by (seed, epoch, i), so
        that an augmentation draws the same whichever process runs it. A bad sample raises `InvalidDataError`.
    shape: what the model and the task must know of a sample: `Images`, or another class that they understand.
    collate: makes a batch of a list of samples; None: torch's default_collate.
    prepare: applied to each batch on the model's device, such as uint8 pixels to normalised float32.
    shards: where the training samples lie, if they lie in many files.
    skips_bad_samples: whether a sample that raises `InvalidDataError` is left out and counted, or ends the job.
    draws_from_torch_alone: whether samples draw no number from numpy's and Python's global generators, which then need
        no seeds: a twentieth of the time of a small image.

    Parts, `collate` and `prepare` are sent to other processes: they must be picklable or survive a fork.
    """

    train: Part | Fetches
    test: Part | Fetches
    shape: Any = None
    collate: Callable[[list[Any]], Any] | None = None
    prepare: Callable[[Any], Any] | None = None
    shards: Shards | None = None
    skips_bad_samples: bool = False
    draws_from_torch_alone: bool = False

"""Reads the samples of each micro-batch, in this process or in others, ahead of the step that needs them.

torch's DataLoader does the work: processes, order, prefetching, pinned memory. What it is asked for is a `Request`, so
that which samples come, and the random numbers of each, depend on (seed, epoch, sample) alone.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ngd_workers.contract.errors import InvalidDataError, UserCodeError, WorkerError
from ngd_workers.contract.spec import Loading
from ngd_workers.data import Dataset, Fetches, Part
from ngd_workers.train.batches import Batches, mix

__all__ = ["MicroBatch", "Request", "Samples", "placed", "read_ahead", "requests_to_test", "requests_to_train"]

LARGEST_KEPT_BYTES = 30 * 2**20  # below glibc's bound, 32 MiB, above which an allocation changes nothing


@dataclass(frozen=True, slots=True)
class Request:
    """The samples of one micro-batch. counts: whether its result does; ranks without samples still take part."""

    epoch: int
    indices: list[int]
    counts: bool = True


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What was read for a request, on the CPU: a batch of `samples` samples. skipped: bad ones, left out."""

    content: Any
    samples: int
    skipped: int
    counts: bool


def requests_to_train(
    batches: Batches, *, first_step: int, last_step: int, micro_size: int, rank: int, world_size: int
) -> Iterator[Request]:
    """Yields the rank's micro-batches of these steps, in order."""
    for step in range(first_step, last_step + 1):
        epoch = batches.epoch_of(step)
        for indices in batches.share(step, rank, world_size).split(micro_size):
            yield Request(epoch, indices.tolist())


def requests_to_test(num_samples: int, size: int, *, rank: int, world_size: int) -> Iterator[Request]:
    """Yields the rank's batches of a test part: equally many on every rank, since a model may be spread over ranks."""
    first, last = (num_samples * place // world_size for place in (rank, rank + 1))
    largest = -(-num_samples // world_size)
    for begin in range(first, first + largest, size):
        indices = list(range(begin, min(begin + size, last)))
        yield Request(0, indices) if indices else Request(0, [0], counts=False)


class Samples:
    """The samples of one part, as DataLoader asks for them. Errors come back as values: it would garble their text."""

    def __init__(self, part: Part | Fetches, dataset: Dataset, seed: int) -> None:
        self._part = part
        self._collate = dataset.collate or default_collate
        self._skips = dataset.skips_bad_samples
        self._seed = _seed_torch if dataset.draws_from_torch_alone else _seed_all
        self._job_seed = seed

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError  # DataLoader uses __getitems__ alone

    def __getitems__(self, request: Request) -> tuple[Any, int, int, bool, WorkerError | None]:
        try:
            return *self._read(request), request.counts, None
        except WorkerError as error:
            return None, 0, 0, False, error
        except Exception as error:  # noqa: BLE001 - a user's dataset may raise anything
            return None, 0, 0, False, UserCodeError(f"the data failed with {type(error).__name__}: {error}")

    def _read(self, request: Request) -> tuple[Any, int, int]:
        if isinstance(self._part, Fetches):
            return self._part.batch_of(request.indices), len(request.indices), 0
        samples: list[Any] = []
        with _own_random_numbers():
            for index in request.indices:
                self._seed(mix(self._job_seed, request.epoch, index))
                try:
                    samples.append(self._part[index])
                except InvalidDataError:
                    if not self._skips:
                        raise
        if not samples:
            raise InvalidDataError(
                f"none of the {len(request.indices)} samples of a micro-batch can be read (the first is number "
                f"{request.indices[0]}); look at the data, or raise batch.micro_size"
            )
        return self._collate(samples), len(samples), len(request.indices) - len(samples)


def read_ahead(samples: Samples, requests: Iterable[Request], loading: Loading, *, pins: bool) -> Iterator[MicroBatch]:
    """Yields the micro-batches in the order of the requests. Raises: what the data raise, in this process.

    pins: whether the batches go to a GPU. The processes end with the iterator.
    """
    loader: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=requests,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        worker_init_fn=_keep_freed_memory,
        num_workers=loading.processes,
        prefetch_factor=loading.prefetch if loading.processes else None,
        pin_memory=pins,
        generator=torch.Generator().manual_seed(0),  # its seeds are not used, and must not move the global one
    )
    for content, count, skipped, counts, error in loader:
        if error is not None:
            raise error
        yield MicroBatch(content, count, skipped, counts)


def placed(content: Any, dataset: Dataset, device: torch.device) -> Any:
    """Returns the batch on the device, prepared."""
    content = _moved(content, device)
    return content if dataset.prepare is None else dataset.prepare(content)


def _moved(content: Any, device: torch.device) -> Any:
    match content:
        case Tensor():
            return content.to(device, non_blocking=True)
        case dict():
            return {name: _moved(value, device) for name, value in content.items()}
        case tuple() if hasattr(content, "_fields"):  # a named tuple
            return type(content)(*(_moved(value, device) for value in content))
        case list() | tuple():
            return type(content)(_moved(value, device) for value in content)
    return content


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _keep_freed_memory(process: int) -> None:
    """Lets a reading process use the memory of one image for the next.

    glibc gives what was freed back to the system, at 1000 page faults a batch, until a larger allocation was freed. In
    this process none is: batches lie in shared memory.
    """
    torch.empty(LARGEST_KEPT_BYTES, dtype=torch.uint8)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Gives the loop's random numbers back to it: in the worker itself, samples are read between its steps."""
    numpy = _numpy()
    states = torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])


def _seed_torch(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _seed_all(seed: int) -> None:
    _seed_torch(seed)
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError:  # the loop itself needs no numpy
        return None
    return np

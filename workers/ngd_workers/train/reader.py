"""The samples of one rank: its micro-batches of each step, and its part of the test data."""

from collections.abc import Iterator

import torch

from ngd_workers.contract.errors import WorkerError
from ngd_workers.contract.spec import JobSpec
from ngd_workers.data import Dataset, Fetches, Part
from ngd_workers.train.batches import Batches
from ngd_workers.train.context import TrainContext
from ngd_workers.train.loading import MicroBatch, Request, Samples, read_ahead, requests_to_test, requests_to_train

__all__ = ["Reader"]

TEST_BATCH = (256, 1000)  # the micro-batch within these bounds: memory; the result does not depend on it


class Reader:
    """Collective, unless samples are in memory: one that a rank can't read ends all ranks, with its error."""

    def __init__(
        self, spec: JobSpec, dataset: Dataset, batches: Batches, last_step: int, context: TrainContext
    ) -> None:
        self._spec, self._dataset, self._batches, self._last_step = spec, dataset, batches, last_step
        self._comm = context.comm
        self._pins = context.device.type == "cuda"
        self._ahead: Iterator[MicroBatch] | None = None
        self._step = 0

    def step(self, step: int) -> list[MicroBatch]:
        """Returns the rank's micro-batches of the step. Raises: InvalidDataError, UserCodeError."""
        if self._ahead is None or step != self._step + 1:
            requests = requests_to_train(
                self._batches,
                first_step=step,
                last_step=self._last_step,
                micro_size=self._spec.micro_size,
                rank=self._comm.rank,
                world_size=self._comm.world_size,
            )
            self._ahead = self._read(self._dataset.train, requests)
        self._step = step
        return [next(self._ahead) for _ in range(self._spec.micro_batches)]

    def test(self) -> Iterator[MicroBatch]:
        """Returns the rank's batches of the test data, equally many on every rank."""
        size = min(max(self._spec.micro_size, TEST_BATCH[0]), TEST_BATCH[1])
        samples = len(self._dataset.test)
        requests = requests_to_test(samples, size, rank=self._comm.rank, world_size=self._comm.world_size)
        return self._read(self._dataset.test, requests)

    def close(self) -> None:
        """Ends the processes that read samples."""
        self._ahead = None

    def _read(self, part: Part | Fetches, requests: Iterator[Request]) -> Iterator[MicroBatch]:
        samples = Samples(part, self._dataset, self._spec.seed)
        read = read_ahead(samples, requests, self._spec.loading, pins=self._pins)
        return read if isinstance(part, Fetches) or self._comm.world_size == 1 else self._agreed(read)

    def _agreed(self, read: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            failure: WorkerError | None = None
            micro_batch = None
            try:
                micro_batch = next(read, None)
            except WorkerError as error:
                failure = error
            failed = torch.tensor([float(failure is not None)], device=self._comm.device)
            self._comm.all_reduce("samples that can't be read", failed)
            if failed.item():
                raise next(f for f in self._comm.all_gather_object("read errors", failure) if f is not None)
            if micro_batch is None:
                return
            yield micro_batch

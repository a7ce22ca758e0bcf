"""Images per CPU second of the loader, beside a bare loop that does the same work: read, decode, crop, flip, stack.

Run: python -m benchmarks.data_loading --shards FOLDER [--size S] [--batch B] [--batches N] [--rounds R] [--hardware H]

FOLDER comes from `ngd data pack`. The ways take turns of N batches in each round, all with the same images. A turn ends
when the reading processes have again read as far ahead as they may, so that it has the CPU seconds of exactly N
batches, of this process and of its reading processes. Start-up is a figure of its own. A figure is the median over
rounds; a way is compared with the bare loop of the same round.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import default_collate

from benchmarks.record import folder_for, write
from ngd_workers.contract.spec import ImageSettings, Loading, WebDataset
from ngd_workers.data import load_dataset
from ngd_workers.data.images import augmented, decode
from ngd_workers.shards.index import INDEX_NAME, parse_index
from ngd_workers.train.batches import Batches
from ngd_workers.train.loading import Samples, read_ahead, requests_to_train

BARE = "bare loop"
IDLE_S = 0.1  # ten ticks of the clock of another process


def main() -> None:
    """Measures and writes benchmarks/results/<date>_data-loading_<hardware>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hardware", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = _ways(arguments.shards, arguments.size, arguments.batch)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            rates[name].append(arguments.batches * arguments.batch / way.cpu_s(arguments.batches))
            print(f"{name}: {rates[name][-1]:.0f} images per CPU second", flush=True)
    started = {name: way.start_s - way.at_start * arguments.batch / max(rates[name]) for name, way in ways.items()}
    settings = {key: getattr(arguments, key) for key in ("size", "batch", "batches", "rounds")}
    folder = folder_for("data-loading", arguments.hardware)
    write(folder, {**settings, "rates": rates, "start_up_s": started}, _table(settings, rates, started))


class Way:
    """One way to read batches, with its reading processes. start_s: CPU seconds of its first `at_start` batches."""

    def __init__(self, batches: Iterator[Any], processes: int) -> None:
        others = set(psutil.Process().children())
        begin = time.process_time()
        self._batches = batches
        next(batches)
        own = time.process_time() - begin
        self._processes = set(psutil.Process().children()) - others
        self.start_s, self.at_start = own + self._others_cpu_s(), 1 + Loading().prefetch * processes

    def cpu_s(self, batches: int) -> float:
        """Returns the CPU seconds of the next batches."""
        before, begin = self._others_cpu_s(), time.process_time()
        for _ in range(batches):
            next(self._batches)
        own = time.process_time() - begin
        return own + self._others_cpu_s() - before

    def _others_cpu_s(self) -> float:
        """Returns the CPU seconds of the reading processes, once they have nothing to do."""
        last = -1.0
        while (now := sum(sum(process.cpu_times()[:2]) for process in self._processes)) > last:
            last = now
            time.sleep(IDLE_S if self._processes else 0)
        return last


def _ways(shards: Path, size: int, batch: int) -> dict[str, Way]:
    dataset = load_dataset(WebDataset(directory=str(shards), images=ImageSettings(size=size)), None)
    bare = Bare(shards)

    def plan() -> Batches:
        return Batches(len(dataset.train), batch, 0, dataset.shards)

    def loaded(processes: int) -> Iterator[Any]:
        steps = {"first_step": 1, "last_step": 10**9}
        requests = requests_to_train(plan(), **steps, micro_size=batch, rank=0, world_size=1)
        return read_ahead(Samples(dataset.train, dataset, 0), requests, Loading(processes=processes), pins=False)

    return {
        "read and decode alone": Way(bare.decoded(plan()), 0),
        BARE: Way(bare.batches(plan(), size), 0),
        **{f"loader, {n} processes": Way(loaded(n), n) for n in (0, 1, 2)},
    }


class Bare:
    """The images by plain reads at the places in the index."""

    def __init__(self, shards: Path) -> None:
        folder = shards / "train"
        index = parse_index((folder / INDEX_NAME).read_bytes(), str(folder))
        files = [os.open(folder / shard.name, os.O_RDONLY) for shard in index.shards]
        self._places = [
            (file, length, offset, label)
            for file, shard in zip(files, index.shards, strict=True)
            for offset, length, label in zip(shard.offsets, shard.lengths, shard.labels, strict=True)
        ]

    def decoded(self, plan: Batches) -> Iterator[None]:
        for step in count(1):
            for index in plan.share(step, 0, 1).tolist():
                self._image(index)
            yield

    def batches(self, plan: Batches, size: int) -> Iterator[Any]:
        """Reads, decodes, crops, flips and stacks, and does nothing else."""
        transform = augmented(ImageSettings(size=size))
        for step in count(1):
            samples = []
            for index in plan.share(step, 0, 1).tolist():
                image, label = self._image(index)
                samples.append((transform(image), label))
            yield default_collate(samples)

    def _image(self, index: int) -> tuple[torch.Tensor, int]:
        file, length, offset, label = self._places[index]
        return decode(os.pread(file, length, offset)), label


def _table(settings: dict[str, int], rates: dict[str, list[float]], started: dict[str, float]) -> str:
    lines = [
        "# Loading images from shards",
        "",
        f"{settings['size']} x {settings['size']} random resized crops, batches of {settings['batch']}, turns of "
        f"{settings['batches']} batches, {settings['rounds']} rounds; images per CPU second.",
        "",
        "| way | median | lowest | highest | of the bare loop: median | lowest | highest | start-up, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, values in rates.items():
        of_bare = [value / bare for value, bare in zip(values, rates[BARE], strict=True)]
        spread = " | ".join(f"{of(values):.0f}" for of in (statistics.median, min, max))
        shares = " | ".join(f"{of(of_bare):.2f}" for of in (statistics.median, min, max))
        lines.append(f"| {name} | {spread} | {shares} | {max(0.0, started[name]):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

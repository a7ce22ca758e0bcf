"""Images per CPU second of the loader, beside a bare loop that does the same work: read, decode, crop, flip, stack.

Run: python -m benchmarks.data_loading --shards FOLDER [--batches N] [--rounds R] [--hardware NAME]

FOLDER comes from `ngd data pack`. The ways take turns in each round; CPU seconds are those of this process and of the
reading processes, start-up included. A figure is the median over rounds.
"""

import argparse
import os
import resource
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import default_collate

from benchmarks.record import folder_for, write
from ngd_workers.contract.spec import ImageSettings, Loading, WebDataset
from ngd_workers.data import Dataset, load_dataset
from ngd_workers.data.images import augmented, decode
from ngd_workers.shards.index import INDEX_NAME, parse_index
from ngd_workers.train.batches import Batches
from ngd_workers.train.loading import Samples, read_ahead, requests_to_train

SIZE, BATCH = 112, 256
BARE = "bare loop"


def main() -> None:
    """Measures and writes benchmarks/results/<date>_data-loading_<hardware>/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hardware", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(WebDataset(directory=str(arguments.shards), images=ImageSettings(size=SIZE)), None)
    bare, plan = Bare(arguments.shards), Batches(len(dataset.train), BATCH, 0, dataset.shards)
    ways: dict[str, Callable[[], None]] = {
        "read and decode alone": lambda: _decoded(bare, plan, arguments.batches),
        BARE: lambda: _bare(bare, plan, arguments.batches),
        **{
            f"loader, {n} processes": lambda n=n: _loaded(dataset, plan, arguments.batches, n)  # type: ignore[misc]
            for n in (0, 1, 2)
        },
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, run in ways.items():
            before = _cpu_s()
            run()
            rates[name].append(arguments.batches * BATCH / (_cpu_s() - before))
            print(f"{name}: {rates[name][-1]:.0f} images per CPU second", flush=True)
    folder = folder_for("data-loading", arguments.hardware)
    write(folder, {"size": SIZE, "batch": BATCH, "batches": arguments.batches, "rates": rates}, _table(rates))


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

    def image(self, index: int) -> tuple[torch.Tensor, int]:
        file, length, offset, label = self._places[index]
        return decode(os.pread(file, length, offset)), label


def _decoded(bare: Bare, plan: Batches, batches: int) -> None:
    for step in range(1, batches + 1):
        for index in plan.share(step, 0, 1).tolist():
            bare.image(index)


def _bare(bare: Bare, plan: Batches, batches: int) -> None:
    """Reads, decodes, crops, flips and stacks, and does nothing else."""
    transform = augmented(ImageSettings(size=SIZE))
    for step in range(1, batches + 1):
        samples = []
        for index in plan.share(step, 0, 1).tolist():
            image, label = bare.image(index)
            samples.append((transform(image), label))
        default_collate(samples)


def _loaded(dataset: Dataset, plan: Batches, batches: int, processes: int) -> None:
    requests = requests_to_train(plan, first_step=1, last_step=batches, micro_size=BATCH, rank=0, world_size=1)
    for _ in read_ahead(Samples(dataset.train, dataset, 0), requests, Loading(processes=processes), pins=False):
        pass


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _table(rates: dict[str, list[float]]) -> str:
    bar = statistics.median(rates[BARE])
    lines = [
        "# Loading images from shards",
        "",
        f"Imagenette's shards, {SIZE} x {SIZE} random resized crops, batches of {BATCH}; images per CPU second.",
        "",
        "| way | median | lowest | highest | of the bare loop |",
        "|---|---|---|---|---|",
    ]
    for name, values in rates.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {median:.0f} | {min(values):.0f} | {max(values):.0f} | {median / bar:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

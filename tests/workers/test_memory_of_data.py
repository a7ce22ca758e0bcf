"""Data sets larger than the memory that a process may have: they are read at constant memory."""

import io
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from ngd_workers.contract.spec import DataChoice, Loading
from ngd_workers.data import load_dataset
from ngd_workers.shards.index import index_shards, write_index
from ngd_workers.train.batches import Batches
from ngd_workers.train.loading import Samples, read_ahead, requests_to_train
from tests.support.picture_files import picture

MIB = 2**20
DATA_BYTES = 128 * MIB
SPARE_BYTES = 64 * MIB  # the limit: as much as the process has once it can read, and this
GLOBAL_SIZE = 16


def write_shards(folder: Path) -> dict[str, Any]:
    """Writes JPEG files with many bytes after their end, which decoders pass over."""
    image = picture(0) + bytes(MIB // 2)
    for part, shards, samples in (("train", 12, DATA_BYTES // 12 // len(image) + 1), ("val", 1, 1)):
        (folder / part).mkdir(parents=True)
        for shard in range(shards):
            with tarfile.open(folder / part / f"{shard}.tar", "w") as tar:
                for number in range(samples):
                    for ending, content in (("jpg", image), ("cls", b"0")):
                        member = tarfile.TarInfo(f"{number}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        write_index(index_shards(folder / part, ["one"], lambda *_: None), folder / part)
    return {"kind": "webdataset", "directory": str(folder), "images": {"size": 8}}


def write_tokens(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    np.zeros(DATA_BYTES // 2, np.uint16).tofile(folder / "train.bin")
    file = str(folder / "train.bin")
    return {"kind": "tokens", "train": file, "test_fraction": 0.01, "vocabulary": 4, "length": 16 * 1024}


def write_rows(folder: Path) -> dict[str, Any]:
    """Writes row groups of 4 MiB: a window of them lies in memory."""
    folder.mkdir()
    rows, width = 256, 4096
    x = np.zeros((rows, width), np.float32)
    values = pa.FixedSizeListArray.from_arrays(x.ravel(), width)
    table = pa.table({"x": values, "class": np.arange(rows) % 2})
    files = {part: folder / f"{part}.parquet" for part in ("train", "test")}
    for part, groups in (("train", DATA_BYTES // x.nbytes + 1), ("test", 1)):
        with pq.ParquetWriter(files[part], table.schema, use_dictionary=False, compression="none") as writer:
            for _ in range(groups):
                writer.write_table(table)
    named = {part: [str(file)] for part, file in files.items()}
    return {"kind": "parquet", **named, "features": ["x"], "label": "class", "window": 2}


WRITERS = {"shards": write_shards, "tokens": write_tokens, "rows": write_rows}


def read_in_little_memory(kind: str, folder: str, processes: int) -> None:
    """Runs in a process of its own: reads an epoch under a limit below the data's size."""
    choice: Any = TypeAdapter(DataChoice).validate_python(WRITERS[kind](Path(folder)))
    dataset = load_dataset(choice, None)
    plan = Batches(len(dataset.train), GLOBAL_SIZE, 0, dataset.shards)

    def read(steps: int) -> None:
        requests = requests_to_train(plan, first_step=1, last_step=steps, micro_size=GLOBAL_SIZE, rank=0, world_size=1)
        samples = Samples(dataset.train, dataset, 0)
        batches = read_ahead(samples, requests, Loading(processes=processes), pins=False)
        assert sum(batch.samples for batch in batches) == steps * GLOBAL_SIZE

    read(1)  # loads libraries
    limit = _data_bytes() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with pytest.raises(MemoryError):
        bytearray(DATA_BYTES)
    read(plan.steps_per_epoch)


def _data_bytes() -> int:
    """Returns the private writable memory of this process, which RLIMIT_DATA bounds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's data is Linux's")
@pytest.mark.parametrize(("kind", "processes"), [("shards", 0), ("shards", 1), ("tokens", 0), ("rows", 0)])
def test_data_larger_than_the_memory_of_a_process_are_read(tmp_path: Path, kind: str, processes: int) -> None:
    read = read_in_little_memory
    code = f"from {__name__} import {read.__name__} as read; read({kind!r}, {str(tmp_path / 'data')!r}, {processes})"

    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr

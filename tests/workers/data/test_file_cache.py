"""Files kept on disk up to a bound, by several processes at once."""

import fcntl
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from ngd_workers.contract.errors import SpecError, StorageError
from ngd_workers.data.file_cache import FileCache

SIZE = 1000


def content(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


class Afar:
    """Fetches files by name, and counts how often."""

    def __init__(self, folder: Path, most_files: int = 2) -> None:
        self.cache, self.fetched = FileCache(folder, most_files * SIZE), list[str]()

    def read(self, name: str, begin: int = 10, length: int = 20) -> bytes:
        def fetch(into: Path) -> None:
            self.fetched.append(name)
            into.write_bytes(content(name))

        return self.cache.read_range(name, SIZE, begin, length, fetch)


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_file_is_fetched_once_and_the_oldest_goes_first(tmp_path: Path) -> None:
    afar = Afar(tmp_path)
    for name in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b, since a was read after it
        assert afar.read(name) == content(name)[10:30]
        assert taken(tmp_path) <= 2 * SIZE

    assert afar.fetched == ["a", "b", "c", "b"]


def test_a_file_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"data\.cache\.bytes must be at least the largest shard's, 1000, got 0"):
        Afar(tmp_path, most_files=0).read("a")


def test_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def fetch(into: Path) -> None:
        into.write_bytes(b"half")
        raise SpecError("no")

    with pytest.raises(SpecError, match="no"):
        FileCache(tmp_path, SIZE).read_range("a", SIZE, 0, 1, fetch)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_partial_file_of_a_dead_process_is_removed_and_that_of_a_living_one_waits(tmp_path: Path) -> None:
    dead = tmp_path / f"{'0' * 32}-{SIZE}.partial"
    foreign = tmp_path / "notes.txt"
    for path in (dead, foreign):
        path.write_bytes(b"x")
    living = tmp_path / f"{'1' * 32}-{SIZE}.partial"
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        afar = Afar(tmp_path)
        afar.read("a")
        afar.read("b")  # in place of a: the living one's room is taken
        afar.read("a")

    assert afar.fetched == ["a", "b", "a"]
    assert not dead.exists()
    assert living.exists()
    assert foreign.exists()


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StorageError, match=r"can't use data\.cache\.directory .*file"):
        Afar(tmp_path / "file").read("a")


def _read_many(folder: Path, seed: int, counts: "multiprocessing.Queue[int]") -> None:
    afar = Afar(folder, most_files=3)
    draw = random.Random(seed)
    for _ in range(200):
        name = draw.choice("abcdefgh")
        assert afar.read(name) == content(name)[10:30]
        held = sum(int(path.name.split("-")[1].split(".")[0]) for path in folder.iterdir() if "-" in path.name)
        assert held <= 4 * SIZE, held  # a listing is no snapshot: a file may be renamed while it is made
    counts.put(len(afar.fetched))


def test_processes_share_the_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_read_many, args=(tmp_path, seed, counts)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert sum(counts.get() for _ in processes) < 800
    assert taken(tmp_path) <= 3 * SIZE
    assert not [path for path in os.listdir(tmp_path) if path.endswith(".partial")]

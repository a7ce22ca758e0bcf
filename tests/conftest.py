"""One thread for each process, unless OMP_NUM_THREADS says otherwise: files of tests run side by side.

150 tests of layers on two cores: 28 CPU seconds with torch's two threads, which spin while they wait, and 16 with one.
"""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, here and in every process started


@pytest.fixture(autouse=True, scope="module")
def settled_heap() -> None:
    """Keeps collections of garbage from walking what all earlier files have imported, which takes them a second."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # otherwise libraries report at exit that they leak

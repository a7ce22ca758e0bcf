"""A long list of texts in two blocks of memory, which forked processes share.

A list of a million strings takes 100 MB, and each process that reads it gets a copy: reading changes reference counts.
"""

from collections.abc import Iterable

import numpy as np

__all__ = ["Names"]


class Names:
    """Texts by number.

    >>> Names(["a.jpg", "b.jpg"])[1]
    'b.jpg'
    """

    def __init__(self, texts: Iterable[str]) -> None:
        blob, ends = bytearray(), [0]
        for text in texts:
            blob += text.encode("utf-8", "surrogateescape")  # file names may be no UTF-8
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._blob[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

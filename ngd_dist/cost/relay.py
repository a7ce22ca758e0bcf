"""Two hops in place of one, where one rank would get much from each of the others: the rule, and the parts.

In the first hop each rank gets an equal part of everything, and adds up what came; in the second the sums go on to the
ranks that need them. It moves up to twice the bytes, and none of them piles up at one rank: a reduce-scatter and an
all-gather ([OT20]'s stages 3 and 5) over messages of any sizes. Used in training and in plans; imports no torch.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Part", "cut", "filled", "relays"]

Name = TypeVar("Name", bound=Hashable)


class Part(NamedTuple, Generic[Name]):
    """The numbers [begin, end) of one flat tensor, which are the rank's part of it in the first hop."""

    name: Name
    rank: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """The count of its numbers."""
        return self.end - self.begin


def relays(sizes: Iterable[float], ranks: int) -> bool:
    """Returns whether two hops take less time than one. sizes: what each rank sends to all others, or gets from each.

    In one hop the busiest rank gets the largest size from each of the others. In two it gets its part of the whole from
    each of them, and then the largest size once.

    >>> relays([8, 8, 8, 8], 4), relays([32, 0, 0, 0, 0, 0, 0, 0], 8)
    (False, True)
    """
    sizes = list(sizes)
    largest = max(sizes, default=0)
    return (ranks - 1) * largest > 2 * (sum(sizes) + largest)


def cut(sizes: Mapping[Name, int], ranks: int) -> list[Part[Name]]:
    """Returns the parts of tensors that lie end to end, in order; each rank's parts have equally many numbers in all.

    >>> [tuple(part) for part in cut({"a": 3, "b": 1}, 2)]
    [('a', 0, 0, 2), ('a', 1, 2, 3), ('b', 1, 0, 1)]
    """
    length = max(1, -(-sum(sizes.values()) // ranks))
    parts, start = list[Part[Name]](), 0
    for name, size in sizes.items():
        for rank in range(start // length, -(-(start + size) // length)):
            begin, end = max(rank * length - start, 0), min((rank + 1) * length - start, size)
            parts.append(Part(name, rank, begin, end))
        start += size
    return parts


def filled(nbytes: Mapping[Name, int], limit: float) -> Iterator[list[Name]]:
    """Yields buckets of at most `limit` bytes, in order; one that has more is alone in its bucket. 0: one bucket."""
    bucket, size = list[Name](), 0
    for name, of_one in nbytes.items():
        if bucket and 0 < limit < size + of_one:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += of_one
    if bucket:
        yield bucket

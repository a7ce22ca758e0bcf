"""The fields in which several tensors travel, each as its codec says: statistics, and the entries of caches."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

from ngd_dist.distributed.packed_bytes import packed_nbytes
from ngd_dist.factors.codec import Codec, Field

__all__ = ["Wire"]

Name = TypeVar("Name", bound=Hashable)


class Wire(Generic[Name]):
    """The codecs of tensors by name. The key of a field is the name of its tensor and the number of the field."""

    def __init__(self, codecs: Mapping[Name, Codec]) -> None:
        self._codecs = codecs

    def fields(self, names: Iterable[Name]) -> dict[tuple[Name, int], Field]:
        """Returns the fields in which these tensors travel, in order."""
        return {(name, i): field for name in names for i, field in enumerate(self._codecs[name].fields)}

    def nbytes(self, name: Name) -> int:
        """Returns the bytes in which one tensor travels."""
        return packed_nbytes(self._codecs[name].fields)

    def encode(self, values: Mapping[Name, Tensor]) -> dict[tuple[Name, int], Tensor]:
        """Returns the tensors of those fields."""
        return {(n, i): tensor for n, value in values.items() for i, tensor in enumerate(self._codecs[n].encode(value))}

    def decode(self, name: Name, tensors: Mapping[tuple[Name, int], Tensor]) -> Tensor:
        """Returns one tensor, from a mapping that has its fields."""
        codec = self._codecs[name]
        return codec.decode([tensors[name, i] for i in range(len(codec.fields))])

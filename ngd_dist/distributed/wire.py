"""What a parcel of several tensors is made of, each as its codec says: statistics, and the entries of caches."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

from ngd_dist.distributed.parcel import parcel_size
from ngd_dist.factors.codec import Codec, Field

__all__ = ["Wire"]

Name = TypeVar("Name", bound=Hashable)


class Wire(Generic[Name]):
    """The codecs of tensors by name. In a parcel each field goes by the name of its tensor and its own number."""

    def __init__(self, codecs: Mapping[Name, Codec]) -> None:
        self._codecs = codecs

    def fields(self, names: Iterable[Name]) -> dict[tuple[Name, int], Field]:
        """Returns what the parcel of these tensors is made of."""
        return {(name, i): field for name in names for i, field in enumerate(self._codecs[name].fields)}

    def nbytes(self, name: Name) -> int:
        """Returns the bytes of the parcel of one tensor."""
        return parcel_size(self._codecs[name].fields)

    def encode(self, values: Mapping[Name, Tensor]) -> dict[tuple[Name, int], Tensor]:
        """Returns the tensors of those fields."""
        return {(n, i): tensor for n, value in values.items() for i, tensor in enumerate(self._codecs[n].encode(value))}

    def decode(self, name: Name, tensors: Mapping[tuple[Name, int], Tensor]) -> Tensor:
        """Returns one tensor, from the fields of a parcel that has it."""
        codec = self._codecs[name]
        return codec.decode([tensors[name, i] for i in range(len(codec.fields))])

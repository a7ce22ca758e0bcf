"""The movement of statistics, gradients, inverses and directions: the roles of `placement` put into collectives.

Ranks are data-parallel until the gradients are there and layer-parallel from then on: SP-NGD's stages 3 to 5
([OT20]), with directions gathered instead of weights.
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from ngd_dist.cost.relay import relays
from ngd_dist.distributed.base import (
    REPORT_NUMBERS,
    GlobalMeans,
    LayerLayout,
    LocalContribution,
    RefreshReport,
    StepResult,
    flatten,
    read_counts,
    split_like,
)
from ngd_dist.distributed.buckets import Buckets
from ngd_dist.distributed.comm import Communicator, Pending
from ngd_dist.distributed.exchange import Route, begin_exchange, begin_spread
from ngd_dist.distributed.local import mean_directions
from ngd_dist.distributed.pieces import Pieces
from ngd_dist.distributed.placement import Placement
from ngd_dist.distributed.relay import begin_sums
from ngd_dist.distributed.wire import Wire
from ngd_dist.factors.codec import AsItIs, Field
from ngd_dist.statistics.statistic import Key

__all__ = ["Sync"]

Cache = dict[str, Tensor]
TensorKey = TypeVar("TensorKey", bound=Hashable)
TensorName = tuple[str, str]  # a layer, and an entry of its cache or the name of another tensor
HAS_CACHE, REPORTS, INNER = (("", "has_cache"), 0), ("", "reports"), ("", "inner")


class Sync:
    """Moves the tensors of a step between ranks. All ranks must make the same calls, with the same due keys.

    kind: the strategy's name in the config. dtype: that of gradients and directions on their way. exact, wire: the
    dtypes in which statistics are summed, and travel; see `Form.on_wire`. kept: the dtype of dense inverses, if it has
    16 bits. A rank decodes the values of each other rank before it sums them, so that a value is rounded once.
    gradient_scale: the factor on sums of gradients over ranks; None if an engine has averaged them already.
    bucket_bytes: the size of the buckets in which statistics leave while the backward pass is running. They take links
    of their own, since the model or the training loop may send then too. 0: all statistics leave in `collect`.
    pieces: the routes of pieces if an engine shards. Then `collect` leaves gradients alone, and directions come back
    as pieces.
    """

    def __init__(
        self,
        comm: Communicator,
        placement: Placement,
        layouts: Mapping[str, LayerLayout],
        *,
        kind: str,
        dtype: torch.dtype,
        exact: torch.dtype,
        wire: torch.dtype,
        kept: torch.dtype | None,
        device: torch.device,
        gradient_scale: float | None,
        bucket_bytes: float,
        pieces: Pieces | None = None,
    ) -> None:
        self.pieces = pieces
        self.comm = comm
        self.placement = placement
        self.kind = kind
        self.dtype = dtype
        self.gradient_scale = gradient_scale
        self._layouts = layouts
        self._exact = exact
        self._forms = {
            Key(name, spec.name): spec.form for name, layout in layouts.items() for spec in layout.statistics
        }
        self._local = {
            Key(name, spec.name) for name, layout in layouts.items() for spec in layout.statistics if spec.is_local
        }
        self._wire = Wire({key: form.on_wire(exact, wire) for key, form in self._forms.items()})
        self._entries: Wire[TensorName] = Wire(
            {
                (n, e): form.in_cache(layout.dtype, kept)
                for n, layout in layouts.items()
                for e, form in layout.cache.items()
            }
        )
        self._device = device
        roles = placement.roles
        self._everywhere = {name for name in layouts if placement.is_everywhere(name)}
        # A gradient with several holders goes by an all-reduce: that sends twice its size, no more than point to point.
        self._reduced = [name for name in layouts if len(roles[name].holders) == 1 < comm.world_size]
        counts = {len(role.holders) for role in roles.values()}
        self._is_for_all = pieces is None and counts <= {1, comm.world_size}
        self._due: list[Key] = []
        self._small: dict[Key, Tensor] = {}
        self._kept: dict[Key, Tensor] = {}
        inverters = {name: (role.owner, *set(role.inverters) - {role.owner}) for name, role in roles.items()}
        beside_backward = comm.aside() if bucket_bytes else comm
        sizes = {key: form.numbers for key, form in self._forms.items()}
        self._buckets = Buckets(
            beside_backward, self._wire, inverters, sizes, device, exact=exact, rounded=wire, limit_bytes=bucket_bytes
        )

    def inverts(self, layer: str) -> bool:
        """Returns whether this rank folds the layer's statistics and refreshes its cache."""
        return self.comm.rank in self.placement.roles[layer].inverters

    def holds(self, layer: str) -> bool:
        """Returns whether this rank has the layer's cache, and applies it."""
        return self.comm.rank in self.placement.roles[layer].holders

    def reports(self, layer: str) -> bool:
        """Returns whether this rank's reports on the layer count."""
        return self.comm.rank == self.placement.roles[layer].owner

    def is_replicated(self, layer: str) -> bool:
        """Returns whether all ranks of several refresh the layer, whether from the same statistics or their own."""
        return len(self.placement.roles[layer].inverters) > 1

    def is_local(self, layer: str) -> bool:
        """Returns whether each rank has a cache of its own, of its own samples."""
        return self._layouts[layer].is_local

    def statistic_bytes(self, key: Key) -> int:
        """Returns the bytes that a rank sends of this statistic, a mean over ranks."""
        if key in self._local:
            return 0
        ranks, is_small = self.comm.world_size, self._is_summed_everywhere(key.layer)
        numbers, inverters = self._forms[key].numbers, len(self.placement.roles[key.layer].inverters)
        nbytes = numbers * self.dtype.itemsize if is_small else self._wire.nbytes(key)
        if key in self._buckets.relayed:
            return (nbytes + numbers * self._exact.itemsize * inverters) * (ranks - 1) // ranks
        return nbytes * (ranks - 1) * (2 if inverters > 1 else 1) // ranks

    def begin(self, due: Sequence[Key]) -> None:
        """Collective. Begins a new step with these due statistics."""
        self._due, self._small, self._kept = list(due), {}, {}
        travelling = (key for key in due if key not in self._local)
        self._buckets.begin([key for key in travelling if not self._is_summed_everywhere(key.layer)])

    def offer(self, key: Key, value: Tensor) -> None:
        """Takes this rank's value of a due statistic; it must not change any more. The first one counts."""
        value = value.to(self._exact)
        if key in self._local:
            self._kept.setdefault(key, value)
        elif self.comm.world_size == 1:
            self._small.setdefault(key, value)
        elif self._is_summed_everywhere(key.layer):
            self._small.setdefault(key, self._forms[key].flatten(value))
        else:
            self._buckets.offer(key, self._forms[key].flatten(value))

    def collect(self, local: LocalContribution) -> GlobalMeans:
        """Collective. Returns the means over ranks; a due statistic that was not offered counts as zeros."""
        is_sent = self.gradient_scale is not None
        self._buckets.launch()
        mean = [key for key in self._due if key not in self._local]
        small = {key: self._small_value(key) for key in mean if self._is_summed_everywhere(key.layer)}
        wide = {name: g for name, g in local.gradients.items() if name not in self._reduced} if is_sent else {}
        # Whole gradients that an engine has averaged are finite on all ranks or on none; pieces are not.
        others = [local.flags, *wide.values(), *local.plain] if is_sent else [local.flags] if self.pieces else []
        pending = self._begin_sum([*small.values()], [*([local.counts] if self._due else []), *others])
        to_owners = self._begin_reduce(local.gradients) if is_sent else None
        sums = self._given_to_all(self._buckets.finish())
        statistics, others = pending.wait()
        sums |= zip(small, statistics, strict=True)
        counts, others = (others[0], others[1:]) if self._due else (local.counts, others)
        flags, gradients, plain = others[0] if self.pieces else local.flags, local.gradients, local.plain
        if to_owners is not None:
            flags, *averaged = [others[0], *map(self._averaged, others[1:])]
            gradients = {name: self._averaged(total) for name, total in to_owners.wait().items()}
            gradients |= zip(wide, averaged, strict=False)
            plain = averaged[len(wide) :]
        is_finite, missing, miscounted, captured = read_counts(flags, counts, self._due)
        means = {k: self._mean(k, total, captured[k.layer].ranks) for k, total in sums.items() if k.layer in captured}
        means |= {key: value for key, value in self._kept.items() if key.layer in captured}
        held = {name: gradients[name] for name in self._layouts if self.holds(name)}
        return GlobalMeans(is_finite, missing, miscounted, captured, means, held, plain)

    def share(
        self, caches: Mapping[str, Cache | None], entries: Mapping[str, Collection[str]]
    ) -> dict[str, Cache | None]:
        """Collective. Returns these entries as the owners of their layers have made them; None if there is no cache.

        entries: those that may have changed, by layer, the same on every rank. A holder of a layer gets all of them
        that it did not make itself, other ranks get the shared ones; layers of which nothing travels are left out.
        caches: those of this rank.
        """
        travelling = {name: list(changed) for name, changed in entries.items() if self._travels(name, changed)}
        if not travelling:
            return {}
        owned = {name: caches[name] for name in travelling if self.reports(name)}
        made = {(n, entry): cache[entry] for n, cache in owned.items() if cache is not None for entry in travelling[n]}
        sent = self._entries.encode(made)
        sent[HAS_CACHE] = torch.tensor([float(cache is not None) for cache in owned.values()], device=self._device)
        from_ranks = self._spread("inverses", self._cache_route(travelling), sent).wait()
        has_cache = torch.cat([from_rank[HAS_CACHE] for from_rank in from_ranks]).tolist()  # one host read
        shared, here = dict[str, Cache | None](), self.comm.rank
        for rank, from_rank in enumerate(from_ranks):
            for name in (name for name in travelling if self.placement.roles[name].owner == rank):
                arrived = [entry for entry in travelling[name] if ((name, entry), 0) in from_rank and rank != here]
                cache = {entry: self._entries.decode((name, entry), from_rank) for entry in arrived}
                shared[name] = cache if has_cache.pop(0) else None
        return shared

    def averaged(self, directions: Mapping[str, Tensor], lacking: Collection[str]) -> dict[str, Tensor]:
        """Collective. Returns the directions, with means over ranks where each rank has a cache of its own.

        lacking: the layers without a cache here. See `mean_directions`.
        """
        local = {name: directions[name] for name in self._layouts if self.is_local(name)}
        return {**directions, **mean_directions(self.comm, local, lacking, self.dtype)}

    def publish(self, result: StepResult, due: Sequence[Key]) -> StepResult:
        """Collective. Returns the directions of all ranks and, for each statistic, its owner's report.

        Every rank reports on a local statistic: see `RefreshReport.of_ranks`.
        """
        is_sharded = len(self._everywhere) < len(self._layouts)
        if self.pieces is None and (not (is_sharded or due) or self.comm.world_size == 1):
            return result
        rows = [result.reports[key].numbers() for key in self._reported(due, self.comm.rank)]
        sent = {(name, "direction"): direction for name, direction in result.directions.items()}
        if self.pieces is not None:
            sent = self.pieces.outgoing(result.directions)
        sent[REPORTS] = torch.tensor(rows, dtype=self.dtype, device=self._device).view(-1, REPORT_NUMBERS)
        is_counted = [float(self.reports(name)) for name in self._layouts]
        sent[INNER] = result.inner * result.inner.new_tensor(is_counted)  # only the owner's
        kind = "directions" if is_sharded else "reports"
        from_ranks = self._spread(kind, self._result_route(due, result.inner), sent).wait()
        directions = dict(result.directions) if self.pieces is None else self.pieces.incoming(from_ranks)
        for from_rank in from_ranks:
            directions |= {name: tensor for (name, kind), tensor in from_rank.items() if kind == "direction"}
        of_ranks = defaultdict[Key, list[RefreshReport]](list)
        for rank, from_rank in enumerate(from_ranks):
            for key, numbers in zip(self._reported(due, rank), from_rank[REPORTS].tolist(), strict=True):
                of_ranks[key].append(RefreshReport.parse(numbers))
        reports = {key: RefreshReport.of_ranks(each) for key, each in of_ranks.items()}
        inner = torch.stack([from_rank[INNER] for from_rank in from_ranks]).sum(0)
        return StepResult({name: directions[name].to(self.dtype) for name in self._layouts}, reports, inner)

    def _reported(self, due: Sequence[Key], rank: int) -> list[Key]:
        """Returns the due statistics on which a rank reports: those of its layers, and all local ones."""
        return [key for key in due if key in self._local or self.placement.roles[key.layer].owner == rank]

    def _is_summed_everywhere(self, layer: str) -> bool:
        return self.comm.world_size == 1 or self.placement.roles[layer].is_small

    def _small_value(self, key: Key) -> Tensor:
        if key in self._small:
            return self._small[key]
        form = self._forms[key]
        shape = form.shape if self.comm.world_size == 1 else (form.numbers,)
        return torch.zeros(shape, dtype=self._exact, device=self._device)

    def _mean(self, key: Key, total: Tensor, ranks: int) -> Tensor:
        """Returns the mean in the statistic's shape. One rank flattens nothing: packing takes as long as inverting."""
        return total if self.comm.world_size == 1 else self._forms[key].expand(total / ranks)

    def _begin_sum(self, statistics: list[Tensor], others: list[Tensor]) -> Pending[tuple[list[Tensor], list[Tensor]]]:
        """Returns the sums of both on every rank."""
        tensors = [*statistics, *others]
        if self.comm.world_size == 1 or not tensors:
            return Pending(lambda: (statistics, others))
        buffer = flatten(tensors, self.dtype)
        size = sum(tensor.numel() for tensor in statistics) * buffer.itemsize
        kinds = {"gradients": buffer.nbytes - size} | ({"statistics": size} if size else {})
        pending = self.comm.begin_all_reduce("gradients", buffer, kinds=kinds)

        def split() -> tuple[list[Tensor], list[Tensor]]:
            sums = split_like(pending.wait(), tensors)
            return sums[: len(statistics)], sums[len(statistics) :]

        return Pending(split)

    def _begin_reduce(self, gradients: Mapping[str, Tensor]) -> Pending[dict[str, Tensor]]:
        """Returns the sums of gradients of the layers that this rank alone holds."""
        if not self._reduced:
            return Pending(dict)
        shapes = {name: self._layouts[name].gradient for name in self._reduced}
        name = "gradients to owners"
        owned = [0] * self.comm.world_size
        for layer, shape in shapes.items():
            owned[self.placement.roles[layer].owner] += prod(shape)
        if relays(owned, self.comm.world_size):
            return self._in_two_hops(name, gradients, shapes)

        def route(source: int, target: int) -> dict[str, Field]:
            roles = self.placement.roles
            return {n: Field(shape, self.dtype) for n, shape in shapes.items() if roles[n].owner == target}

        pending = begin_exchange(self.comm, name, route, gradients, self._device, kind="gradients")
        return Pending(lambda: self._added(pending.wait()))

    def _in_two_hops(
        self, name: str, gradients: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Pending[dict[str, Tensor]]:
        begin_second_hop = begin_sums(
            self.comm,
            name,
            {layer: prod(shape) for layer, shape in shapes.items()},
            {layer: gradients[layer].flatten() for layer in shapes},
            lambda _, numbers: AsItIs((numbers,), self.dtype),
            lambda layer: self.placement.roles[layer].holders,
            dtype=self.dtype,
            device=self._device,
            kind="gradients",
        )

        def sums() -> dict[str, Tensor]:
            return {layer: total.view(shapes[layer]) for layer, total in begin_second_hop().wait().items()}

        return Pending(sums)

    def _spread(
        self, name: str, route: Route[TensorKey], tensors: Mapping[TensorKey, Tensor]
    ) -> Pending[list[dict[TensorKey, Tensor]]]:
        """Sends along a route of which a rank has the same for all others, unless some but not all hold a layer."""
        if not self._is_for_all:
            return begin_exchange(self.comm, name, route, tensors, self._device, kind=name)
        ranks = self.comm.world_size
        return begin_spread(
            self.comm, name, lambda rank: route(rank, (rank + 1) % ranks), tensors, self._device, kind=name
        )

    def _added(self, from_ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the sums in rank order."""
        sums = {name: gradient.to(self.dtype) for name, gradient in from_ranks[0].items()}
        for from_rank in from_ranks[1:]:
            sums = {name: total + from_rank[name] for name, total in sums.items()}
        return sums

    def _averaged(self, total: Tensor) -> Tensor:
        return total if self.gradient_scale in (None, 1.0) else total.mul_(self.gradient_scale)

    def _given_to_all(self, sums: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Returns the sums; layers that all ranks invert have theirs on all ranks, rounded again on the way."""
        roles = self.placement.roles
        keys = [k for k in self._due if self.is_replicated(k.layer) and not self._is_summed_everywhere(k.layer)]
        keys = [key for key in keys if key not in self._buckets.relayed and key not in self._local]
        if not keys:
            return sums

        def route(source: int, target: int) -> dict[tuple[Key, int], Field]:
            return self._wire.fields(key for key in keys if roles[key.layer].owner == source)

        sent = self._wire.encode({key: sums[key] for key in keys if key in sums})
        from_ranks = begin_exchange(
            self.comm, "sums of statistics", route, sent, self._device, kind="statistics"
        ).wait()
        everywhere = {item: tensor for from_rank in from_ranks for item, tensor in from_rank.items()}
        return sums | {key: self._wire.decode(key, everywhere) for key in keys}

    def _travels(self, layer: str, entries: Collection[str]) -> bool:
        """Returns whether any other rank needs one of these entries of the layer's cache."""
        roles = self.placement.roles[layer]
        if self.is_replicated(layer) or self.comm.world_size == 1:
            return False
        return len(roles.holders) > 1 or any(entry in self._layouts[layer].shared for entry in entries)

    def _cache_route(self, travelling: Mapping[str, Collection[str]]) -> Route[tuple[TensorName, int]]:
        def route(source: int, target: int) -> dict[tuple[TensorName, int], Field]:
            owned = [name for name in travelling if self.placement.roles[name].owner == source]
            fields: dict[tuple[TensorName, int], Field] = {HAS_CACHE: Field((len(owned),), torch.float32)}
            for name in owned:
                layout, is_held = self._layouts[name], target in self.placement.roles[name].holders
                sent = [entry for entry in travelling[name] if is_held or entry in layout.shared]
                if target != source:
                    fields |= self._entries.fields((name, entry) for entry in sent)
            return fields

        return route

    def _result_route(self, due: Sequence[Key], inner: Tensor) -> Route[TensorName]:
        roles = self.placement.roles

        def route(source: int, target: int) -> dict[TensorName, Field]:
            fields: dict[TensorName, Field] = {
                (name, "direction"): Field(layout.gradient, self.dtype)
                for name, layout in self._layouts.items()
                if target not in roles[name].holders and self.placement.supplier(name, target) == source
            }
            if self.pieces is not None:
                fields = self.pieces.fields(source, target)
            fields[REPORTS] = Field((len(self._reported(due, source)), REPORT_NUMBERS), self.dtype)
            fields[INNER] = Field(tuple(inner.shape), self.dtype)
            return fields

        return route

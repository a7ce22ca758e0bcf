"""The only caller of torch.distributed: named collectives that count the bytes that they send.

A collective here must be called by every rank of the group, with the same names in the same order, and with shapes
that fit. A collective that `begin_...` started is under way until it is waited for; until then its tensors must not be
touched.

If a rank raises, hangs or dies, the others don't wait for ever. Under gloo a broken link, or else the group's timeout
(`init_process_group(timeout=...)`, half an hour by default), fails the collective on some rank. That rank then closes
its links, so that all others fail at once too, and each raises a CollectiveError that names the collective, this rank
and the culprit. The group is unusable after it. Under NCCL collectives are only queued: the watchdog of torch ends the
process when the timeout is over, and a CollectiveError is raised only if TORCH_NCCL_BLOCKING_WAIT=1 makes each
collective wait.

Gloo's threads must end before the interpreter does: if a thread frees a tensor after that, it aborts the process
(https://github.com/pytorch/pytorch/issues/190489). `end_collectives` ends them, and runs at a process's exit by itself.
"""

import atexit
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from traceback import clear_frames
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor

from ngd_dist.distributed.postmortem import KeyValueStore, Postmortem, Ticket
from ngd_dist.errors import CollectiveError

__all__ = ["Communicator", "Pending", "end_collectives"]

ENDING_S = 5.0  # for collectives that are still under way at the end: the other ranks end at about the same time
NO_LIMIT = timedelta(0)  # except that of the group
FAILING_S = 1.0  # for a collective to fail after its links were closed: that takes milliseconds

# By group, not by Communicator: the count over the whole group shows the collective that a rank has reached.
_postmortems: WeakKeyDictionary[dist.ProcessGroup, Postmortem] = WeakKeyDictionary()
_asides: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
_under_way: WeakKeyDictionary[dist.ProcessGroup, set["_Launched"]] = WeakKeyDictionary()
_communicators: "WeakSet[Communicator]" = WeakSet()  # those of several ranks, which hold a group


T = TypeVar("T")


class Pending(Generic[T]):
    """A collective under way. Every rank launches its collectives in one order; it may wait for them in any."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish = finish
        self._results: list[T] = []

    def wait(self) -> T:
        """Returns the result, also when called again. Raises: CollectiveError that names the collective."""
        if not self._results:
            self._results.append(self._finish())
        return self._results[0]


@dataclass(eq=False, slots=True)
class _Launched:
    """A reference to torch's work of a collective, dropped at its end: the work holds gloo's links and tensors."""

    work: dist.Work | None
    is_ended: bool = False

    def wait(self, timeout: timedelta = NO_LIMIT) -> None:
        """Raises: RuntimeError if the collective failed, or is still under way after the timeout."""
        if self.work is not None:
            self.work.wait(timeout)
            self.work = None


class Communicator:
    """A process group, or one process without any. Tensors must be contiguous and on the group's device."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        joined = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank(group) if joined else 0
        self.world_size: int = dist.get_world_size(group) if joined else 1
        self._sent: Counter[str] = Counter()
        self._is_aside = False
        self._main = (group or dist.group.WORLD) if self.world_size > 1 else None
        self._postmortem = None if self._main is None else _postmortem_of(self._main)
        if self._main is not None:
            _communicators.add(self)

    def aside(self) -> "Communicator":
        """Collective. Returns these ranks over links of their own: collectives there and here may come in any order.

        Bytes are counted together, and a failure of one ends both. All asides of a group share their links. If torch
        can't make such links, it returns this communicator itself, and the order is not free.
        """
        if self._main is None or _is_part_of_a_split(self._main):
            return self
        if self._main not in _asides:
            with self._named("links aside"):
                _asides[self._main] = _group_like(self._main, self.device)
        aside = copy(self)
        aside._group, aside._is_aside = _asides[self._main], True
        _communicators.add(aside)
        return aside

    def begin_all_reduce(self, name: str, tensor: Tensor, *, kinds: Mapping[str, int]) -> Pending[Tensor]:
        """Collective. Once waited for, the tensor is its sum over the ranks, on every rank; don't read it before.

        kinds: the bytes of the tensor, by the kind under which they are counted.
        """
        if self.world_size == 1:
            return Pending(lambda: tensor)
        for kind, nbytes in kinds.items():
            # A ring sends (P - 1) / P of the buffer twice: it scatters the sums, and gathers them.
            self._sent[kind] += 2 * nbytes * (self.world_size - 1) // self.world_size
        with self._named(name) as ticket:
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
        return self._pending(ticket, work, lambda: tensor)

    def all_reduce(self, name: str, tensor: Tensor, *, kind: str = "control") -> None:
        """Collective. Replaces the tensor, on every rank, by its sum over the ranks."""
        self.begin_all_reduce(name, tensor, kinds={kind: tensor.nbytes}).wait()

    def begin_exchange(
        self, name: str, to_ranks: Sequence[Tensor], sizes: Sequence[int], *, kind: str
    ) -> Pending[list[Tensor]]:
        """Collective. Sends `to_ranks[r]` to rank r. Once waited for, returns the tensor from each rank, in rank order.

        to_ranks: [any length] each, of one dtype. sizes: the length of each rank's tensor, which both sides know.
        The tensor of this rank for itself does not travel, and nothing is padded.
        """
        if self.world_size == 1:
            return Pending(lambda: list(to_ranks))
        sent = [0 if r == self.rank else tensor.numel() for r, tensor in enumerate(to_ranks)]
        received = [0 if r == self.rank else size for r, size in enumerate(sizes)]
        travelling = [tensor for r, tensor in enumerate(to_ranks) if r != self.rank]
        outgoing = travelling[0] if len(travelling) == 1 else torch.cat(travelling)
        incoming = outgoing.new_empty(sum(received))
        self._sent[kind] += outgoing.nbytes
        with self._named(name) as ticket:
            work = dist.all_to_all_single(incoming, outgoing, received, sent, group=self._group, async_op=True)

        def finish() -> list[Tensor]:
            arrived = list(incoming.split(received))
            arrived[self.rank] = to_ranks[self.rank]
            return arrived

        return self._pending(ticket, work, finish)

    def all_gather_object(self, name: str, value: Any) -> list[Any]:
        """Collective. Returns every rank's value, pickled on the way: for checkpoints, not for steps."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._named(name):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, name: str, tensor: Tensor, *, src: int = 0) -> None:
        """Collective. Replaces the tensor, on every rank, by that of the rank `src` of the group."""
        if self.world_size == 1:
            return
        with self._named(name):
            dist.broadcast(tensor, group=self._group, group_src=src)

    def barrier(self, name: str) -> None:
        """Collective. Returns when every rank has called it."""
        arrived = torch.zeros(1, device=self.device)
        self.all_reduce(name, arrived)
        arrived.item()  # NCCL only queues: reading the result waits for it

    def post_error(self, message: str) -> None:
        """Tells the other ranks that this one is about to raise: the errors of their collectives will quote `message`.

        Not collective; returns within seconds. The next collective of this rank takes the message back. It is lost if
        this rank hosts the group's store (rank 0 without a launcher) and ends before the others have read it.
        """
        if self._postmortem is not None:
            self._postmortem.raised(message)

    @property
    def device(self) -> torch.device:
        """The device of all tensors: the current CUDA device under NCCL, else the CPU."""
        if self.world_size > 1 and dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def take_sent(self) -> dict[str, int]:
        """Returns the bytes that this rank has sent since the last call, by kind."""
        sent = dict(self._sent)
        self._sent.clear()
        return sent

    def _pending(self, ticket: Ticket, work: dist.Work | None, finish: Callable[[], T]) -> Pending[T]:
        assert self._main is not None  # of several ranks
        launched, under_way = _Launched(work), _under_way.setdefault(self._main, set())
        under_way.add(launched)

        def wait() -> T:
            if launched.is_ended:
                raise CollectiveError(f"collective {ticket.collective!r} was ended by end_collectives()")
            with self._blaming(ticket):
                under_way.discard(launched)
                launched.wait()
            return finish()

        return Pending(wait)

    @contextmanager
    def _named(self, name: str) -> Iterator[Ticket]:
        assert self._postmortem is not None  # of several ranks
        if self._main is None:
            raise CollectiveError(f"collective {name!r} came after end_collectives(); make a new Communicator")
        ticket = self._postmortem.enter(name, is_aside=self._is_aside)
        with self._blaming(ticket):
            yield ticket

    @contextmanager
    def _blaming(self, ticket: Ticket) -> Iterator[None]:
        assert self._postmortem is not None  # of several ranks
        try:
            yield
        except RuntimeError as error:
            self._postmortem.failed(str(error), ticket)  # before its links are closed: the others then look for it
            if self._main is not None:  # else `end_collectives` has closed them
                _close_links(self._main, _asides.get(self._main))
            raise CollectiveError(
                f"collective {ticket.collective!r} failed on {self._postmortem.rank_names[self.rank]} of "
                f"{self.world_size}: {self._postmortem.explain()}. Torch says: {str(error).strip()}"
            ) from error
        except Exception as error:  # before anything was sent: a value that can't be pickled
            self._postmortem.raised(f"{type(error).__name__}: {error}")
            raise


def end_collectives(*, is_broken: bool = False) -> None:
    """Ends all Communicators: collectives under way, links aside, and their references to the groups.

    Not collective, but waits some seconds for collectives that other ranks have a part in. If they don't end, or at
    once if this rank `is_broken`, this rank's links are closed, so that everything over them fails. The process group
    stays: after the caller's `destroy_process_group` no thread of gloo is left.

    >>> end_collectives()  # at the end of a training script, before dist.destroy_process_group()
    """
    deadline_s = time.monotonic() + (0.0 if is_broken else ENDING_S)
    for group in list(_postmortems):  # each group that had a Communicator, even if that is gone
        under_way, aside = _under_way.pop(group, set()), _asides.pop(group, None)
        if _has_gloo(group):
            _end_all(under_way, deadline_s)
            if is_broken or any(launched.work is not None for launched in under_way):
                _close_links(group, aside)
                _end_all(under_way, time.monotonic() + FAILING_S)
            if aside is not None:
                dist.destroy_process_group(aside)
        for launched in under_way:
            launched.work, launched.is_ended = None, True
    for communicator in list(_communicators):
        communicator._group = communicator._main = None
    _communicators.clear()
    gc.collect()  # an optimizer, its hooks and its model hold each other, and groups and collectives


os.register_at_fork(after_in_child=_postmortems.clear)  # gloo's threads, and their end, stay with the parent


@atexit.register
def _end_at_exit() -> None:
    """Ends the collectives that a script has left. The end of the process would close the links as well."""
    if not _postmortems:
        return
    error = getattr(sys, "last_value", None)
    while error is not None:  # the frames of an error that ended the script hold its models
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    end_collectives(is_broken=True)
    if dist.is_initialized() and _has_gloo(dist.group.WORLD):
        dist.destroy_process_group()
        gc.collect()


def _end_all(under_way: Collection[_Launched], deadline_s: float) -> None:
    for launched in under_way:
        with suppress(RuntimeError):  # it failed, or the deadline has passed
            launched.wait(timedelta(seconds=max(deadline_s - time.monotonic(), 0.001)))


def _has_gloo(group: dist.ProcessGroup | None) -> bool:
    """Returns whether the group has links of gloo; false once it was destroyed."""
    try:
        return "cpu:gloo" in dist.get_backend_config(group)
    except (ValueError, TypeError):  # torch says it in two ways
        return False


def _close_links(*groups: dist.ProcessGroup | None) -> None:
    """Makes the collectives of all other ranks fail now, before their timeouts, which may be long."""
    for group in groups:
        if group is None or not _has_gloo(group):
            continue
        for peer in set(range(dist.get_world_size(group))) - {dist.get_rank(group)}:
            # A receive that times out makes gloo close every link of this rank; from a dead peer it just raises.
            with suppress(RuntimeError):
                receive = dist.irecv(torch.empty(1), group=group, group_src=peer)
                if receive is not None:
                    receive.wait(timedelta(milliseconds=1))


def _is_part_of_a_split(group: dist.ProcessGroup) -> bool:
    """Returns whether ranks outside of the group would have to take part if torch makes another one like it.

    If `init_process_group` was given a device, torch splits the communicator of the world.
    """
    world = dist.group.WORLD
    return world is not None and world.bound_device_id is not None and dist.get_world_size(group) < world.size()


def _group_like(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Collective over the group alone. Returns another group of the same ranks, in the same order."""
    alike = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=group._get_backend(device).options._timeout,  # torch has no public way to ask for it
        backend=dist.get_backend_config(group),
        use_local_synchronization=True,
        sort_ranks=False,
    )
    return cast(dist.ProcessGroup, alike)  # a number stands for the group only outside of it


def _postmortem_of(group: dist.ProcessGroup | None) -> Postmortem:
    assert group is not None  # there are several ranks
    if group not in _postmortems:
        weak = ref(group)

        def store() -> KeyValueStore:
            if (alive := weak()) is None:
                raise RuntimeError("the process group was destroyed")
            return cast(KeyValueStore, alive.get_group_store())

        global_ranks = dist.get_process_group_ranks(group)
        names = [f"rank {r}" + (f" (global rank {g})" if g != r else "") for r, g in enumerate(global_ranks)]
        _postmortems[group] = Postmortem(dist.get_rank(group), names, store)
    return _postmortems[group]

"""What each rank does: its phases and the resources of its process, gathered by a reduction that a step has anyway.

Rank 0 asks every few seconds, by a number of the reduction; in the next step each rank adds its row of numbers to it.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.events import Ranks

__all__ = ["MOST_RANKS", "PHASES", "RankWatch", "Usage"]

log = logging.getLogger(__name__)

EVERY_S = 5.0
MOST_RANKS = 256  # of some 20 numbers each: 40 KB every five seconds
UNKNOWN = -1.0  # as it travels: no number here is negative
PHASES: tuple[str, ...] = (
    *("data", "forward_backward", "capture", "loss_reduce"),
    *("reduce", "refresh", "apply", "publish", "update", "telemetry"),
)
RESOURCES = ("cpu", "memory_bytes", "gpu", "gpu_memory_bytes", "sent_bytes_per_s", "received_bytes_per_s")


class Usage:
    """Reads the resources of this process and its machine. CPU and network are means since the last reading."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._clock = device, clock
        self._has_nvml = device.type == "cuda"
        try:
            import psutil
        except ImportError:
            log.info("psutil is not installed: the workers panel has no CPU, memory and network of this rank")
            self._psutil: Any = None
        else:
            self._psutil, self._process = psutil, psutil.Process()
        self._before = self._counters()

    def read(self) -> dict[str, float | None]:
        """Returns each of RESOURCES; None for one that can't be told here."""
        before, self._before = self._before, self._counters()
        seconds = max(self._before[0] - before[0], 1e-9)
        rates = [
            None if a is None or b is None else (b - a) / seconds for a, b in zip(before, self._before, strict=True)
        ]
        _, cpu, sent, received = rates
        memory = self._process.memory_info().rss if self._psutil else None
        gpu_memory = torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else None
        values = (cpu, memory, self._gpu(), gpu_memory, sent, received)
        return dict(zip(RESOURCES, values, strict=True))

    def _counters(self) -> tuple[float, float | None, float | None, float | None]:
        """Returns the time, and so far: CPU seconds of this process, bytes that its machine has sent and received."""
        if not self._psutil:
            return self._clock(), None, None, None
        cpu = self._process.cpu_times()
        links = [of for name, of in self._psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
        sent, received = sum(of.bytes_sent for of in links), sum(of.bytes_recv for of in links)
        return self._clock(), cpu.user + cpu.system, sent, received

    def _gpu(self) -> float | None:
        if not self._has_nvml:
            return None
        try:
            return torch.cuda.utilization(self._device) / 100
        except Exception as error:  # noqa: BLE001 - no pynvml, or anything that a driver answers: a job needs neither
            log.info("the GPU's utilisation can't be read, and the workers panel has none: %s", error)
            self._has_nvml = False
            return None


class RankWatch:
    """Every rank makes the same calls: `outgoing` before a step's reduction, `incoming` with its sums."""

    def __init__(self, comm: Communicator, usage: Usage, clock: Callable[[], float] = time.monotonic) -> None:
        self._comm, self._usage, self._clock = comm, usage, clock
        self._is_asked = False
        self._asked_s = -EVERY_S  # so that a short job tells once
        self._steps = 0
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Takes the phases of a step of this rank."""
        self._steps += 1
        for phase, spent in seconds.items():
            self._seconds[phase] += spent

    def outgoing(self) -> list[float]:
        """Returns this rank's summands: 1 to ask for all rows in the next step, and the rows if they were asked for."""
        now_s = self._clock()
        asks = self._comm.rank == 0 and not self._is_asked and self._steps > 0 and now_s - self._asked_s >= EVERY_S
        if asks:
            self._asked_s = now_s
        if not self._is_asked:
            return [float(asks)]
        ranks, width = self._num_told, len(PHASES) + len(RESOURCES)
        rows = [0.0] * (ranks * width)
        if self._comm.rank < ranks:
            begin = self._comm.rank * width
            rows[begin : begin + width] = self._row()
        return [0.0, *rows]

    def incoming(self, sums: Sequence[float]) -> Ranks | None:
        """Returns what all ranks told, if they were asked to."""
        asked, *numbers = sums
        was_asked, self._is_asked = self._is_asked, asked > 0
        if not was_asked:
            return None
        steps, self._steps, self._seconds = self._steps, 0, defaultdict(float)
        width = len(PHASES) + len(RESOURCES)
        columns = [numbers[place::width] for place in range(width)]
        of_phases = dict(zip(PHASES, columns, strict=False))
        resources = zip(RESOURCES, columns[len(PHASES) :], strict=True)
        return Ranks(
            steps=steps,
            seconds={phase: [_short(value) for value in of] for phase, of in of_phases.items() if any(of)},
            **{name: [None if value < 0 else _short(value) for value in of] for name, of in resources},
        )

    @property
    def _num_told(self) -> int:
        return min(self._comm.world_size, MOST_RANKS)

    def _row(self) -> list[float]:
        phases = [self._seconds.get(phase, 0.0) / max(self._steps, 1) for phase in PHASES]
        known = self._usage.read()
        return phases + [UNKNOWN if known[name] is None else float(known[name] or 0.0) for name in RESOURCES]


def _short(value: float) -> float:
    """Returns five digits: more than a table has."""
    return float(f"{value:.5g}")

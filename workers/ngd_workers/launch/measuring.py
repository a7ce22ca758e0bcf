"""A short run of a job in this process, whose times set a device's rates: see `ngd_dist.cost.calibration`."""

import gc
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median

import torch

from ngd_dist import NGD
from ngd_dist.config import FixedInterval, NGDConfig
from ngd_dist.cost.calibration import Measured, StepSeconds
from ngd_dist.cost.card import ModelCard
from ngd_dist.distributed.comm import Communicator
from ngd_dist.telemetry import Stopwatch
from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import JobSpec, NGDOptimizer
from ngd_workers.data import Dataset, load_dataset
from ngd_workers.models import build_model
from ngd_workers.tasks import build_task
from ngd_workers.train.context import device_name, device_of
from ngd_workers.train.learner import Learner
from ngd_workers.train.loading import MicroBatch, Request, Samples

__all__ = ["BLOCK", "COUNTED", "measured"]

CYCLES, WARM_UP = 4, 1  # of two blocks for each size
BLOCK = 4  # steps, of which the first refreshes
# Of two blocks. The first one of a size still finds what the last size decided; the step after a refresh finds the
# processor's caches filled by it.
COUNTED = (BLOCK, *range(BLOCK + 2, 2 * BLOCK))
# Without an average few rows may stand for a factor, and the sizes would be measured in two ways; a method that refuses
# an average keeps rows at each size.
EMA_DECAY = 0.5


def measured(spec: JobSpec, card: ModelCard, data_dir: Path | None) -> Measured:
    """Returns the times of steps with the job's micro-batch and with a quarter of it, with and without a refresh.

    On CPU they are the process's own time. Raises: WorkerError.
    """
    if not isinstance(spec.optimizer, NGDOptimizer):
        raise SpecError(f"a run is measured with optimizer ngd, got {spec.optimizer.kind}; measure a job of it instead")
    sizes = sorted({spec.micro_size, max(1, spec.micro_size // 4)}, reverse=True)
    if len(sizes) < 2:
        raise SpecError(
            "a run is measured at a micro-batch and at a quarter of it: batch.micro_size must be 2 at least, got 1"
        )
    torch.set_num_threads(spec.resources.threads_per_worker)
    device = device_of(spec.resources)
    optimizer = _measured_settings(spec.optimizer)
    spec = _one_process(spec, optimizer)
    dataset = load_dataset(spec.data, data_dir)
    torch.manual_seed(spec.seed)
    task = build_task(spec.task, dataset.shape)

    def new_learner(spec: JobSpec) -> Learner:
        return Learner(build_model(spec.model, dataset.shape), task, dataset, spec, Communicator(), device)

    learner = new_learner(spec)
    batches = {size: _batch(dataset, spec, size) for size in sizes}
    seconds: dict[tuple[int, bool], list[float]] = defaultdict(list)
    phases: dict[tuple[int, bool], list[dict[str, float]]] = defaultdict(list)
    with _clock_of(device):
        for cycle, size, index in product(range(WARM_UP + CYCLES), sizes, range(2 * BLOCK)):
            taken, of_phases = _step(learner, batches[size], spec.optimizer.lr, device)
            kind = (size, index == BLOCK)
            if cycle >= WARM_UP and index in COUNTED:
                seconds[kind].append(taken)
                phases[kind].append(of_phases)
        del learner
        gc.collect()  # the model and its optimizer hold each other
        learner = new_learner(_one_process(spec, optimizer.model_copy(update={"stagger": 1.0})))
        blocks = [
            sum(_step(learner, batches[sizes[-1]], spec.optimizer.lr, device)[0] for _ in range(BLOCK)) / BLOCK
            for _ in range(WARM_UP + CYCLES)
        ]
    return Measured(
        device=device_name(device),
        card=card,
        optimizer=NGDConfig.model_validate(optimizer.model_dump(include=set(NGDConfig.model_fields))),
        in_turn_s=median(blocks[WARM_UP:]),
        steps=tuple(
            StepSeconds(
                samples=size, refreshes=refreshes, seconds=median(taken), phases=_medians(phases[size, refreshes])
            )
            for (size, refreshes), taken in seconds.items()
        ),
    )


def _measured_settings(optimizer: NGDOptimizer) -> NGDOptimizer:
    """Returns the settings with all statistics due in the first step of each block."""
    in_blocks = optimizer.model_copy(
        update={"staleness": FixedInterval(steps=BLOCK), "stagger": 0.0, "refresh_cap": None, "strategy": None}
    )
    averaged = in_blocks.model_copy(update={"ema_decay": max(EMA_DECAY, optimizer.ema_decay)})
    keeps_rows = averaged.preconditioner.refuses(averaged) is not None
    return in_blocks if keeps_rows else averaged


def _one_process(spec: JobSpec, optimizer: NGDOptimizer) -> JobSpec:
    """Returns the job of one worker, whose step is one micro-batch."""
    return spec.model_copy(
        update={
            "optimizer": optimizer,
            "resources": spec.resources.model_copy(update={"workers": 1}),
            "batch": spec.batch.model_copy(update={"global_size": spec.micro_size, "micro_size": None}),
        }
    )


def _batch(dataset: Dataset, spec: JobSpec, size: int) -> MicroBatch:
    """Returns a micro-batch of training samples, some of them twice if there are too few."""
    indices = [index % len(dataset.train) for index in range(size)]
    content, count, skipped, counts, error = Samples(dataset.train, dataset, spec.seed).__getitems__(
        Request(0, indices)
    )
    if error is not None:
        raise error
    return MicroBatch(content, count, skipped, counts)


def _step(learner: Learner, batch: MicroBatch, lr: float, device: torch.device) -> tuple[float, dict[str, float]]:
    """Returns the seconds of a step, and those of the optimizer's phases."""
    start = Stopwatch.clock()
    learner.backward([batch])
    learner.update([batch], lr)
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = Stopwatch.clock() - start
    assert isinstance(learner.optimizer, NGD)
    return taken, dict(learner.optimizer.stats.seconds)


@contextmanager
def _clock_of(device: torch.device) -> Iterator[None]:
    """On CPU, counts the process's own time, so that other processes don't count."""
    before = Stopwatch.clock
    Stopwatch.clock = time.perf_counter if device.type == "cuda" else time.process_time
    try:
        yield
    finally:
        Stopwatch.clock = before


def _medians(of_steps: list[dict[str, float]]) -> dict[str, float]:
    names = {name for phases in of_steps for name in phases}
    return {name: median(phases.get(name, 0.0) for phases in of_steps) for name in sorted(names)}

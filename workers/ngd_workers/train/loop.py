"""train(spec, context): the same loop under Ray, under torchrun and in one process. START HERE: `train`."""

import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ngd_dist.telemetry import Stopwatch
from ngd_workers.contract.errors import NonFiniteLossError, StorageError, SupersededError, WorkerError
from ngd_workers.contract.events import (
    CheckpointFailed,
    CheckpointSaved,
    Evaluation,
    Started,
    StepRecord,
    TargetReached,
)
from ngd_workers.contract.patience import insist
from ngd_workers.contract.rundir import Outcome
from ngd_workers.contract.spec import JobSpec, Loading, NGDOptimizer
from ngd_workers.data import Dataset, load_dataset
from ngd_workers.models import build_model
from ngd_workers.tasks import build_task
from ngd_workers.tasks.base import Task
from ngd_workers.train.batches import Batches, seed_everything, seed_step
from ngd_workers.train.checkpoints import Checkpoints, Manifest
from ngd_workers.train.context import TrainContext, commit, versions
from ngd_workers.train.learner import Learner, check_fit, trainable
from ngd_workers.train.loading import Samples, placed, read_ahead, test_requests
from ngd_workers.train.optimizers import chooses_lr, step_stats
from ngd_workers.train.reader import Reader
from ngd_workers.train.schedules import lr_factor, total_steps
from ngd_workers.train.target import reaches, target_metric
from ngd_workers.train.totals import Totals

__all__ = ["train"]

log = logging.getLogger(__name__)

STOP_CODES = {None: 0, "cancelled": 1, "superseded": 2}
PROGRESS_S = 5.0
LAST_CHECKPOINT_S = 60.0  # for all tries: the last checkpoint is the result
TRIAL_SAMPLES = 8


def train(spec: JobSpec, context: TrainContext) -> Outcome:
    """Collective. Returns the outcome of the training, the same on every rank. Raises: WorkerError, on every rank."""
    run = Run(spec, context)
    try:
        run.resume()
        run.announce()
        while not run.is_finished:
            run.step_once()
            if run.is_evaluation_due:
                run.evaluate()
            if run.is_checkpoint_due:
                run.save_checkpoint()
        return run.outcome()
    finally:
        run.close()


@dataclass(slots=True)
class Progress:
    """The state that a checkpoint keeps besides model and optimizer."""

    step: int = 0
    target_step: int | None = None
    seconds: float = 0.0
    skipped_samples: int = 0


class Run:
    """The state of one training run between steps."""

    def __init__(self, spec: JobSpec, context: TrainContext) -> None:
        self.spec, self.context = spec, context
        torch.set_num_threads(spec.resources.threads_per_worker)
        self.dataset, self.task, self.batches, model = _prepare(spec, context)
        self.learner = Learner(model, self.task, self.dataset, spec, context.comm, context.device)
        self.total_steps = total_steps(spec.schedule, self.batches.steps_per_epoch)
        self.reader = Reader(spec, self.dataset, self.batches, self.total_steps, context)
        self.checkpoints = Checkpoints(context.run_dir / "checkpoints", context.attempt, spec.checkpoint.keep)
        self.progress = Progress()
        self.tested: dict[str, float] = {}
        self.is_cancelled = False
        self._stopwatch = Stopwatch()
        self._logged_s = 0.0

    @property
    def is_finished(self) -> bool:
        reached = self.progress.target_step is not None and self.spec.target is not None and self.spec.target.stop
        return self.is_cancelled or reached or self.progress.step >= self.total_steps

    @property
    def is_evaluation_due(self) -> bool:
        every = self.spec.schedule.evaluate_every_steps or self.batches.steps_per_epoch
        return not self.is_cancelled and (self.progress.step % every == 0 or self.is_finished)

    @property
    def is_checkpoint_due(self) -> bool:
        return self.progress.step % self.spec.checkpoint.every_steps == 0 or self.is_finished

    @property
    def _is_result(self) -> bool:
        return self.is_finished and not self.is_cancelled

    @property
    def epoch(self) -> float:
        return self.progress.step / self.batches.steps_per_epoch

    def resume(self) -> None:
        """Collective. Restores the newest whole checkpoint; rank 0 chooses it for all ranks."""
        comm, chosen, failure = self.context.comm, 0, None
        if comm.rank == 0:
            try:
                chosen = self.checkpoints.newest_step()
            except StorageError as error:
                failure = error
        chosen, failure = comm.all_gather_object("checkpoint to resume from", (chosen, failure))[0]
        if failure is not None:
            raise failure
        if chosen:
            state = self.checkpoints.load(chosen, self.context.device)
            self.progress = Progress(**state.pop("progress"))
            self.learner.load_state_dict(state)

    def close(self) -> None:
        """Ends the processes that read samples."""
        self.reader.close()

    def announce(self) -> None:
        """Reports the start of the run, on rank 0."""
        if self.context.comm.rank:
            return
        optimizer = self.learner.optimizer
        self.context.reporter.report(
            Started(
                spec=self.spec.model_dump(mode="json"),
                seed=self.spec.seed,
                commit=commit(),
                versions=versions(),
                world_size=self.context.comm.world_size,
                device=_device_name(self.context.device),
                total_steps=self.total_steps,
                steps_per_epoch=self.batches.steps_per_epoch,
                parameters=trainable(self.learner.model),
                resumed_step=self.progress.step,
                statistics=list(getattr(optimizer, "statistic_names", [])),
                plain_parameters=dict(getattr(optimizer, "plain_parameters", {})),
                metrics=list(self.task.metrics),
            )
        )
        if self.progress.step:
            log.info("resumed from the checkpoint of step %d", self.progress.step)

    def step_once(self) -> None:
        """Collective. Takes one optimizer step and reports it. Raises: NonFiniteLossError, SupersededError."""
        start_s = time.perf_counter()
        self.progress.step += 1
        seed_step(self.spec.seed, self.progress.step, self.context.comm.rank)
        with self._stopwatch.phase("data"):
            micro_batches = self.reader.step(self.progress.step)
        with self._stopwatch.phase("forward_backward"):
            totals = self.learner.backward(micro_batches)
        with self._stopwatch.phase("loss_reduce"):
            metrics = self._reduce(totals)
        lr = self.spec.optimizer.lr * lr_factor(self.spec.schedule, self.progress.step, self.total_steps)
        with self._stopwatch.phase("update"):
            self.learner.update(micro_batches, lr)
        seconds = time.perf_counter() - start_s
        self.progress.seconds += seconds
        self._report_step(metrics, seconds)

    def evaluate(self) -> None:
        """Collective. Scores the model on the test data and compares the score with the target."""
        start_s = time.perf_counter()
        self._test()
        self.progress.seconds += time.perf_counter() - start_s
        step, report, tested, target = self.progress.step, self.context.reporter.report, self.tested, self.spec.target
        report(Evaluation(step=step, epoch=self.epoch, metrics=tested))
        self._log("test", tested)
        if target is not None and self.progress.target_step is None and reaches(target, self.task, tested):
            self.progress.target_step = step
            report(TargetReached(step=step, metrics={target.metric: tested[target.metric]}))

    def save_checkpoint(self) -> None:
        """Collective. Rank 0 writes; all ranks return when the checkpoint is complete.

        If a checkpoint can't be written, training reports that and goes on; the last one has to be written.
        Raises: SupersededError, StorageError.
        """
        state = self.learner.state_dict() | {"progress": asdict(self.progress)}
        failure: WorkerError | None = None
        if self.context.comm.rank == 0:
            failure = self._write_checkpoint(state)
        failure = self.context.comm.all_gather_object("checkpoint written", failure)[0]
        if failure is not None:
            raise failure

    def _write_checkpoint(self, state: dict[str, Any]) -> WorkerError | None:
        step, reporter = self.progress.step, self.context.reporter
        reporter.flush()  # an attempt after a crash resumes here, and does not report the earlier steps
        try:
            manifest = self._save_persistently(step, state) if self._is_result else self._save(step, state)
        except SupersededError as error:
            log.warning("%s", error)
            return error
        except StorageError as error:
            log.error("%s", error)
            reporter.report(CheckpointFailed(step=step, message=str(error)))
            return error if self._is_result else None
        path = self.checkpoints.path(manifest.step).relative_to(self.context.run_dir)
        reporter.report(CheckpointSaved(step=manifest.step, path=str(path), bytes=manifest.bytes))
        return None

    def _save(self, step: int, state: dict[str, Any]) -> Manifest:
        return self.checkpoints.save(step, state, world_size=self.context.comm.world_size)

    def _save_persistently(self, step: int, state: dict[str, Any]) -> Manifest:
        return insist(lambda: self._save(step, state), "save the last step", patience_s=LAST_CHECKPOINT_S)

    def outcome(self) -> Outcome:
        """Collective. Returns the result; evaluates if this process has not evaluated the last step."""
        if not self.tested and not self.is_cancelled:
            self._test()
        return Outcome(
            result="cancelled" if self.is_cancelled else "succeeded",
            step=self.progress.step,
            metrics=self.tested,
            target_step=self.progress.target_step,
            seconds=self.progress.seconds,
        )

    def _test(self) -> None:
        self.tested = self.learner.evaluate(self.reader.test()).metrics(self.task)
        if not math.isfinite(self.tested["loss"]):
            raise NonFiniteLossError(self._divergence(self.tested["loss"], "test"))

    def _reduce(self, totals: Totals) -> dict[str, float]:
        # The one synchronisation of a step with the host. It comes before the update, so that no rank writes NaN into
        # its weights, and carries the stop request, so that all ranks stop after the same step.
        comm = self.context.comm
        stop_code = totals.reduce(comm, "loss and stop request", STOP_CODES[self.context.reporter.stop_request])
        self.progress.skipped_samples += totals.skipped
        metrics = totals.metrics(self.task)
        if not math.isfinite(metrics["loss"]) and not self._skips_non_finite:
            raise NonFiniteLossError(self._divergence(metrics["loss"], "training"))
        if stop_code == STOP_CODES["superseded"]:
            raise _superseded(self.context.attempt)
        self.is_cancelled = stop_code == STOP_CODES["cancelled"]
        return metrics

    @property
    def _skips_non_finite(self) -> bool:
        # The gradients of such a loss are not finite either: the optimizer then skips the step on all ranks.
        optimizer = self.spec.optimizer
        return isinstance(optimizer, NGDOptimizer) and optimizer.non_finite == "skip"

    def _divergence(self, loss: float, which: str) -> str:
        optimizer, schedule = self.spec.optimizer, self.spec.schedule
        advice = []
        if not chooses_lr(self.learner.optimizer):
            advice += [f"lower optimizer.lr ({optimizer.lr:g})"]
            advice += [f"lengthen schedule.warmup_steps ({schedule.warmup_steps})"]
        if isinstance(optimizer, NGDOptimizer):
            advice += [f"raise optimizer.damping ({optimizer.damping:g})"]
        return f"the {which} loss is {loss} at step {self.progress.step}; {' or '.join(advice)}"

    def _report_step(self, metrics: dict[str, float], seconds: float) -> None:
        optimizer = self.learner.optimizer
        stats, lr = step_stats(optimizer), optimizer.param_groups[0]["lr"]
        phases = self._stopwatch.take() | stats.seconds
        phases["forward_backward"] -= phases.get("capture", 0.0)  # the hooks run inside: no second is counted twice
        self.context.reporter.report(
            StepRecord(
                step=self.progress.step,
                epoch=self.epoch,
                time_s=time.time(),
                metrics=metrics,
                lr=lr,
                samples_per_s=self.spec.batch.global_size / seconds,
                seconds=phases,
                bytes_sent=self.learner.gradient_bytes() | stats.bytes_sent,
                ages=list(stats.ages),
                intervals=list(stats.intervals),
                failed_inversions=stats.failed_inversions,
                skipped_samples=self.progress.skipped_samples,
                skipped_steps=stats.skipped_steps,
                damping=optimizer.param_groups[0].get("damping"),
                momentum=optimizer.param_groups[0]["momentum"] if chooses_lr(optimizer) else None,
                reduction_ratio=stats.adapted.reduction_ratio,
            )
        )
        now_s = time.monotonic()
        if now_s - self._logged_s >= PROGRESS_S:
            self._logged_s = now_s
            self._log("training", metrics, f"lr {lr:.3g}")

    def _log(self, which: str, metrics: dict[str, float], *more: str) -> None:
        if self.context.comm.rank == 0:
            values = [f"{which} {name} {value:.4f}" for name, value in metrics.items()]
            place = f"step {self.progress.step}/{self.total_steps}  epoch {self.epoch:.2f}"
            log.info("%s", "  ".join([place, *values, *more]))


Prepared = tuple[Dataset, Task, Batches, torch.nn.Module]


def _prepare(spec: JobSpec, context: TrainContext) -> Prepared:
    failure: WorkerError | None = None
    try:
        prepared = _build(spec, context)
    except WorkerError as error:
        failure = error
    # A failure on one rank alone (a folder that one machine lacks) must end all ranks: the others would wait for it.
    for failure_of_rank in context.comm.all_gather_object("preparation", failure):
        if failure_of_rank is not None:
            raise failure_of_rank
    return prepared


def _build(spec: JobSpec, context: TrainContext) -> Prepared:
    seed_everything(spec.seed)  # a user's function may draw random numbers: the same on every rank and restart
    dataset = load_dataset(spec.data, context.data_dir)
    task = build_task(spec.task, dataset.shape)
    if spec.target is not None:
        target_metric(spec.target, task)
    batches = Batches(len(dataset.train), spec.batch.global_size, spec.seed, dataset.shards)
    torch.manual_seed(spec.seed)
    model = build_model(spec.model, dataset.shape)
    trial = list(test_requests(min(len(dataset.test), TRIAL_SAMPLES), TRIAL_SAMPLES, rank=0, world_size=1))
    for batch in read_ahead(Samples(dataset.test, dataset, spec.seed), trial, Loading(), pins=False):
        check_fit(model, task, placed(batch.content, dataset, torch.device("cpu")))
    return dataset, task, batches, model


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _superseded(attempt: int) -> SupersededError:
    return SupersededError(f"attempt {attempt} stops: a later attempt of the same job has taken over")

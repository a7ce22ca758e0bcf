"""train(spec, context): the same loop under Ray, under torchrun and in one process. START HERE: `train`."""

import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

import torch

from ngd_dist.telemetry import Stopwatch
from ngd_workers.contract.checkpoint_files import ModelFacts, Score, TensorForm
from ngd_workers.contract.errors import NonFiniteLossError, SpecError, WorkerError
from ngd_workers.contract.events import (
    Evaluation,
    Ranks,
    Started,
    TargetReached,
    metric_words,
)
from ngd_workers.contract.rundir import Outcome
from ngd_workers.contract.spec import InitFromCheckpoint, JobSpec, Loading, NGDOptimizer
from ngd_workers.data import Dataset, load_dataset
from ngd_workers.models import build_model
from ngd_workers.report.reporter import StopRequest
from ngd_workers.tasks import build_task
from ngd_workers.tasks.base import Task
from ngd_workers.train.batches import Batches, seed_everything, seed_step
from ngd_workers.train.context import TrainContext, commit, device_name, versions
from ngd_workers.train.continuing import Origin, going_on_from, keep_new_settings, origin_of
from ngd_workers.train.first_weights import load_first_weights
from ngd_workers.train.learner import Learner, check_fit, load_weights, trainable
from ngd_workers.train.loading import Samples, placed, read_ahead, requests_to_test
from ngd_workers.train.optimizers import chooses_lr
from ngd_workers.train.ranks import RankWatch, Usage
from ngd_workers.train.reader import Reader
from ngd_workers.train.records import phases_of, step_record
from ngd_workers.train.saves import Saves
from ngd_workers.train.schedules import lr_factor, total_steps
from ngd_workers.train.stopping import request_of, stop_code_of
from ngd_workers.train.target import reaches, target_metric
from ngd_workers.train.totals import Totals

__all__ = ["train"]

log = logging.getLogger(__name__)

Value = TypeVar("Value")

PROGRESS_S = 5.0
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
        run.saves.finish()
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
    bytes_sent: int = 0


class Run:
    """The state of one training run between steps."""

    def __init__(self, spec: JobSpec, context: TrainContext) -> None:
        self.spec, self.context = spec, context
        torch.set_num_threads(spec.resources.threads_per_worker)
        self.dataset, self.task, self.batches, model, self._facts = _prepare(spec, context)
        self.saves = Saves(context, spec.checkpoint.keep)
        self.total_steps = total_steps(spec.schedule, self.batches.steps_per_epoch)
        self._origin: Origin | None = None
        self._states = self._load_weights(model)
        self.learner = Learner(model, self.task, self.dataset, spec, context.comm, context.device)
        self.reader = Reader(spec, self.dataset, self.batches, self.total_steps, context)
        self.progress = Progress()
        self.tested: dict[str, float] = {}
        self._tested_step = 0
        self.request: StopRequest | None = None
        self._stopwatch = Stopwatch()
        self._ranks = RankWatch(context.comm, Usage(context.device))
        self._told: Ranks | None = None
        self._logged_s = 0.0

    @property
    def is_complete(self) -> bool:
        reached = self.progress.target_step is not None and self.spec.target is not None and self.spec.target.stop
        return reached or self.progress.step >= self.total_steps

    @property
    def is_finished(self) -> bool:
        return self.request is not None or self.is_complete

    @property
    def is_evaluation_due(self) -> bool:
        every = self.spec.schedule.evaluate_every_steps or self.batches.steps_per_epoch
        return self.request != "cancelled" and (self.progress.step % every == 0 or self.is_complete)

    @property
    def is_checkpoint_due(self) -> bool:
        return self.progress.step % self.spec.checkpoint.every_steps == 0 or self.is_finished

    @property
    def epoch(self) -> float:
        return self.progress.step / self.batches.steps_per_epoch

    def resume(self) -> None:
        """Collective. Restores optimizer and progress from the state that the first weights came with, if it did."""
        states, self._states = self._states, None
        if states is None:
            return
        if self._origin is None:
            self.progress = Progress(**self.learner.load(states))
            return
        optimizer = self.learner.optimizer
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        with going_on_from(self._origin):
            self.learner.load(states)
        keep_new_settings(optimizer, fresh, self._origin.changed)
        self.progress = Progress(step=self._origin.step)  # seconds and target stay the other job's own
        if self.context.comm.rank == 0:
            log.info("goes on from %s", self._origin)

    def _load_weights(self, model: torch.nn.Module) -> list[Any] | None:
        """Collective. Gives a model that no engine drives yet its first weights: those of the newest whole checkpoint,
        of another job, of a file, or random ones. Returns the states that belong to a checkpoint's weights.

        Rank 0 chooses for all ranks. A job that has a checkpoint needs its first weights no more.
        """
        saved, init_from = self.saves.newest(), self.spec.init_from
        if saved is not None:
            load_weights(model, *saved)
            return saved[1]
        if isinstance(init_from, InitFromCheckpoint) and init_from.takes == "everything":
            self._origin = self._chosen_origin(init_from)
            weights, states = self._origin.load(self.context.device)
            with going_on_from(self._origin):
                load_weights(model, weights, states)
            return states
        if init_from is not None:
            self._on_rank_0(lambda: load_first_weights(model, init_from, self.context.run_dir, self.context.data_dir))
        return None

    def _chosen_origin(self, choice: InitFromCheckpoint) -> Origin:
        def choose() -> Origin:
            origin = origin_of(choice, self.spec, self.context.run_dir)
            if origin.step >= self.total_steps:
                raise SpecError(
                    f"the checkpoint is of step {origin.step}, and this job ends at step {self.total_steps}; raise "
                    "schedule.epochs or schedule.steps, or name an earlier step in init_from.step"
                )
            return origin

        return self._on_rank_0(choose)

    def _on_rank_0(self, fn: Callable[[], Value]) -> Value:
        """Collective. Returns fn() of rank 0, or raises its WorkerError, on every rank."""
        value: Value | None = None
        failure: WorkerError | None = None
        if self.context.comm.rank == 0:
            try:
                value = fn()
            except WorkerError as error:
                failure = error
        value, failure = self.context.comm.all_gather_object("first weights", (value, failure))[0]
        if failure is not None:
            raise failure
        return value

    def close(self) -> None:
        """Ends the processes that read samples, and the thread that writes a checkpoint."""
        self.reader.close()
        self.saves.close()

    def announce(self) -> None:
        """Collective. Reports the start of the run, on rank 0."""
        hosts = self.context.comm.all_gather_object("hosts", socket.gethostname())
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
                device=device_name(self.context.device),
                total_steps=self.total_steps,
                steps_per_epoch=self.batches.steps_per_epoch,
                parameters=trainable(self.learner.model),
                resumed_step=self.progress.step,
                statistics=list(getattr(optimizer, "statistic_names", [])),
                plain_parameters=dict(getattr(optimizer, "plain_parameters", {})),
                layers=[layer.name for layer in getattr(optimizer, "layers", [])],
                hosts=hosts,
                owners=list(getattr(optimizer, "owners", [])),
                metrics=list(self.task.metrics),
            )
        )
        if self.progress.step:
            log.info("resumed from the checkpoint of step %d", self.progress.step)
        chosen = self.spec.engine
        if chosen is not None and chosen.kind != self.spec.effective_engine.kind:
            log.info("engine %s is left out: one process alone trains the bare model", chosen.kind)

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
        """Collective. Training may go on while the checkpoint is written; the last one is waited for.

        Raises: SupersededError, StorageError.
        """
        is_tested = self._tested_step == self.progress.step and math.isfinite(next(iter(self.tested.values())))
        score = Score(metrics=self.tested, better=self.task.metrics[0].better) if is_tested else None
        snapshot = self.learner.snapshot(asdict(self.progress), score, self._facts)
        self.saves.save(self.progress.step, snapshot, is_result=self._result == "succeeded" and self.is_complete)

    def outcome(self) -> Outcome:
        """Collective. Returns the result; evaluates if this process has not evaluated the last step."""
        if not self.tested and self._result == "succeeded":
            self._test()
        return Outcome(
            result=self._result,
            step=self.progress.step,
            metrics=self.tested,
            target_step=self.progress.target_step,
            seconds=self.progress.seconds,
        )

    @property
    def _result(self) -> Literal["succeeded", "cancelled", "resized"]:
        if self.request == "cancelled":
            return "cancelled"
        return "succeeded" if self.is_complete or self.request is None else "resized"

    def _test(self) -> None:
        self.tested = self.learner.evaluate(self.reader.test()).metrics(self.task)
        self._tested_step = self.progress.step
        if not math.isfinite(self.tested["loss"]):
            raise NonFiniteLossError(self._divergence(self.tested["loss"], "test"))

    def _reduce(self, totals: Totals) -> dict[str, float]:
        # The one synchronisation of a step with the host. It comes before the update, so that no rank writes NaN into
        # its weights, and carries the stop request, so that all ranks stop after the same step, and what ranks tell.
        comm = self.context.comm
        extra = [stop_code_of(self.context), *self._ranks.outgoing()]
        stop_code, *told = totals.reduce(comm, "loss and stop request", extra)
        self._told = self._ranks.incoming(told)
        self.progress.skipped_samples += totals.skipped
        metrics = totals.metrics(self.task)
        if not math.isfinite(metrics["loss"]) and not self._skips_non_finite:
            raise NonFiniteLossError(self._divergence(metrics["loss"], "training"))
        self.request = request_of(stop_code, self.context)
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
        phases = phases_of(optimizer, self._stopwatch.take())
        sent = self.learner.bytes_sent()
        self._ranks.add(phases)
        self.progress.bytes_sent += sum(sent.values())
        if self.context.comm.rank == 0:
            record = step_record(
                optimizer,
                step=self.progress.step,
                epoch=self.epoch,
                metrics=metrics,
                samples_per_s=self.spec.batch.global_size / seconds,
                seconds=phases,
                bytes_sent=sent,
                skipped_samples=self.progress.skipped_samples,
                bytes_so_far=self.progress.bytes_sent,
                ranks=self._told,
            )
            self.context.reporter.report(record)
        now_s = time.monotonic()
        if now_s - self._logged_s >= PROGRESS_S:
            self._logged_s = now_s
            self._log("training", metrics, f"lr {optimizer.param_groups[0]['lr']:.3g}")

    def _log(self, which: str, metrics: dict[str, float], *more: str) -> None:
        if self.context.comm.rank == 0:
            place = f"step {self.progress.step}/{self.total_steps}  epoch {self.epoch:.2f}"
            log.info("%s", "  ".join([place, *metric_words(which, metrics), *more]))


Prepared = tuple[Dataset, Task, Batches, torch.nn.Module, ModelFacts | None]


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
    trial = list(requests_to_test(min(len(dataset.test), TRIAL_SAMPLES), TRIAL_SAMPLES, rank=0, world_size=1))
    inputs: list[TensorForm] | None = None
    for batch in read_ahead(Samples(dataset.test, dataset, spec.seed), trial, Loading(), pins=False):
        inputs = check_fit(model, task, placed(batch.content, dataset, torch.device("cpu")))
    return dataset, task, batches, model, _facts(dataset.shape, inputs)


def _facts(shape: Any, inputs: list[TensorForm] | None) -> ModelFacts | None:
    """Returns what the model was built for; None if its shape can't be told."""
    if inputs is None or not (shape is None or is_dataclass(shape)):
        return None
    if shape is None:
        return ModelFacts(shape={"kind": ""}, inputs=inputs)
    told = {f.name: v for f in fields(shape) if isinstance(v := getattr(shape, f.name), int | float | str)}
    return ModelFacts(shape={"kind": f"{type(shape).__module__}:{type(shape).__qualname__}"} | told, inputs=inputs)

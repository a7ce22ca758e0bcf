"""train(spec, context): the same loop under Ray, under torchrun and in one process. START HERE: `train`."""

import logging
import math
import time
from dataclasses import asdict, dataclass, replace
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
from ngd_workers.contract.spec import JobSpec, NGDOptimizer
from ngd_workers.data import Dataset, load_dataset
from ngd_workers.models import build_model
from ngd_workers.train.batches import Batches, seed_everything, seed_step
from ngd_workers.train.checkpoints import Checkpoints, Manifest
from ngd_workers.train.context import TrainContext, commit, versions
from ngd_workers.train.learner import Learner, Score, check_model, trainable
from ngd_workers.train.optimizers import chooses_lr, step_stats
from ngd_workers.train.schedules import lr_factor, total_steps

__all__ = ["train"]

log = logging.getLogger(__name__)

STOP_CODES = {None: 0, "cancelled": 1, "superseded": 2}
PROGRESS_S = 5.0
LAST_CHECKPOINT_S = 60.0  # for all tries: the last checkpoint is the result


def train(spec: JobSpec, context: TrainContext) -> Outcome:
    """Collective. Returns the outcome of the training, the same on every rank. Raises: WorkerError, on every rank."""
    run = Run(spec, context)
    run.resume()
    run.announce()
    while not run.is_finished:
        run.step_once()
        if run.is_evaluation_due:
            run.evaluate()
        if run.is_checkpoint_due:
            run.save_checkpoint()
    return run.outcome()


@dataclass(slots=True)
class Progress:
    """The state that a checkpoint keeps besides model and optimizer."""

    step: int = 0
    target_step: int | None = None
    seconds: float = 0.0


class Run:
    """The state of one training run between steps."""

    def __init__(self, spec: JobSpec, context: TrainContext) -> None:
        self.spec, self.context = spec, context
        torch.set_num_threads(spec.resources.threads_per_worker)
        self.dataset, self.batches, model = _prepare(spec, context)
        self.learner = Learner(model, spec, context.comm, context.device)
        self.total_steps = total_steps(spec.schedule, self.batches.steps_per_epoch)
        self.checkpoints = Checkpoints(context.run_dir / "checkpoints", context.attempt, spec.checkpoint.keep)
        self.progress = Progress()
        self.score: Score | None = None
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
            x, y = self._batch()
        with self._stopwatch.phase("forward_backward"):
            totals = self.learner.backward(x, y)
        with self._stopwatch.phase("loss_reduce"):
            score = self._reduce(totals)
        lr = self.spec.optimizer.lr * lr_factor(self.spec.schedule, self.progress.step, self.total_steps)
        with self._stopwatch.phase("update"):
            self.learner.update(x, y, lr)
        seconds = time.perf_counter() - start_s
        self.progress.seconds += seconds
        self._report_step(score, seconds)

    def evaluate(self) -> None:
        """Collective. Scores the model on the test data and compares the score with the target."""
        start_s = time.perf_counter()
        score = self.score = self.learner.evaluate(self.dataset)
        self.progress.seconds += time.perf_counter() - start_s
        if not math.isfinite(score.loss):
            raise NonFiniteLossError(self._divergence(score.loss, "test"))
        step, report = self.progress.step, self.context.reporter.report
        report(Evaluation(step=step, epoch=self.epoch, test_loss=score.loss, test_accuracy=score.accuracy))
        self._log_evaluation(score)
        target = self.spec.target
        if target is not None and self.progress.target_step is None and score.accuracy >= target.test_accuracy:
            self.progress.target_step = step
            report(TargetReached(step=step, test_accuracy=score.accuracy))

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
        if self.score is None and not self.is_cancelled:
            self.score = self.learner.evaluate(self.dataset)
        return Outcome(
            result="cancelled" if self.is_cancelled else "succeeded",
            step=self.progress.step,
            test_accuracy=self.score and self.score.accuracy,
            test_loss=self.score and self.score.loss,
            target_step=self.progress.target_step,
            seconds=self.progress.seconds,
        )

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        comm = self.context.comm
        indices = self.batches.share(self.progress.step, comm.rank, comm.world_size).to(self.context.device)
        return self.dataset.train_x[indices], self.dataset.train_y[indices]

    def _reduce(self, totals: torch.Tensor) -> Score:
        # The one synchronisation of a step with the host. It comes before the update, so that no rank writes NaN into
        # its weights, and carries the stop request, so that all ranks stop after the same step.
        comm = self.context.comm
        stop = totals.new_tensor([STOP_CODES[self.context.reporter.stop_request]])
        sums = torch.cat((totals, stop))
        comm.all_reduce("loss and stop request", sums)
        loss_sum, correct, stop_code = sums.tolist()
        size = self.spec.batch.global_size
        score = Score(loss_sum / size, correct / size)
        if not math.isfinite(score.loss) and not self._skips_non_finite:
            raise NonFiniteLossError(self._divergence(score.loss, "training"))
        if stop_code == STOP_CODES["superseded"]:
            raise _superseded(self.context.attempt)
        self.is_cancelled = stop_code == STOP_CODES["cancelled"]
        return score

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

    def _report_step(self, score: Score, seconds: float) -> None:
        optimizer = self.learner.optimizer
        stats, lr = step_stats(optimizer), optimizer.param_groups[0]["lr"]
        phases = self._stopwatch.take() | stats.seconds
        phases["forward_backward"] -= phases.get("capture", 0.0)  # the hooks run inside: no second is counted twice
        self.context.reporter.report(
            StepRecord(
                step=self.progress.step,
                epoch=self.epoch,
                time_s=time.time(),
                loss=score.loss,
                accuracy=score.accuracy,
                lr=lr,
                samples_per_s=self.spec.batch.global_size / seconds,
                seconds=phases,
                bytes_sent=self.learner.gradient_bytes() | stats.bytes_sent,
                ages=list(stats.ages),
                intervals=list(stats.intervals),
                failed_inversions=stats.failed_inversions,
                skipped_steps=stats.skipped_steps,
                damping=optimizer.param_groups[0].get("damping"),
                momentum=optimizer.param_groups[0]["momentum"] if chooses_lr(optimizer) else None,
                reduction_ratio=stats.adapted.reduction_ratio,
            )
        )
        now_s = time.monotonic()
        if self.context.comm.rank == 0 and now_s - self._logged_s >= PROGRESS_S:
            self._logged_s = now_s
            log.info(
                "step %d/%d  epoch %.2f  loss %.4f  accuracy %.4f  lr %.3g",
                self.progress.step, self.total_steps, self.epoch, score.loss, score.accuracy, lr,
            )  # fmt: skip

    def _log_evaluation(self, score: Score) -> None:
        if self.context.comm.rank == 0:
            log.info(
                "step %d/%d  epoch %.2f  test loss %.4f  test accuracy %.4f",
                self.progress.step, self.total_steps, self.epoch, score.loss, score.accuracy,
            )  # fmt: skip


def _prepare(spec: JobSpec, context: TrainContext) -> tuple[Dataset, Batches, torch.nn.Module]:
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


def _build(spec: JobSpec, context: TrainContext) -> tuple[Dataset, Batches, torch.nn.Module]:
    seed_everything(spec.seed)  # a user's function may draw random numbers: the same on every rank and restart
    dataset = load_dataset(spec.data, context.data_dir)
    batches = Batches(len(dataset.train_y), spec.batch.global_size, spec.seed)
    torch.manual_seed(spec.seed)
    model = build_model(spec.model, dataset.shape)
    check_model(model, dataset)
    return _on_device(dataset, context.device), batches, model


def _on_device(dataset: Dataset, device: torch.device) -> Dataset:
    tensors = {name: getattr(dataset, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
    return replace(dataset, **tensors)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _superseded(attempt: int) -> SupersededError:
    return SupersededError(f"attempt {attempt} stops: a later attempt of the same job has taken over")

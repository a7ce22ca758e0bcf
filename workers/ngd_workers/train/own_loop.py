"""A training loop of the user's own, and everything around it: events, checkpoints, restarts, the request to stop.

def train(context: LoopContext) -> None:
    state = context.resume() or first_state(context.config)
    for state in steps_from(state):
        context.report({"loss": state.loss})
        if state.step % 100 == 0 or context.should_stop():
            context.checkpoint(state.as_dict())
        ...
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ngd_dist.errors import CollectiveError
from ngd_workers.contract.errors import IncompatibleCheckpointError, UserCodeError, WorkerError
from ngd_workers.contract.events import Evaluation, Metric, Started, StepRecord, TargetReached, metric_words
from ngd_workers.contract.rundir import Outcome
from ngd_workers.contract.spec import InitFromCheckpoint, LoopSpec
from ngd_workers.functions import load_function
from ngd_workers.train.batches import seed_everything
from ngd_workers.train.checkpoints import Snapshot
from ngd_workers.train.context import TrainContext, commit, device_name, versions
from ngd_workers.train.continuing import checkpoint_of
from ngd_workers.train.saves import Saves, in_host_memory
from ngd_workers.train.stopping import request_of, stop_code_of
from ngd_workers.train.target import is_reached

__all__ = ["LoopContext", "train_own_loop"]

log = logging.getLogger(__name__)

PROGRESS_S = 5.0
OF_A_PEER = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class LoopContext:
    """What a loop of the user's own gets. One for each rank.

    config: `train.options` of the job. seed: the job's; torch, numpy and Python have been seeded with it.
    rank, world_size, device: of this process. process_group: of all ranks; None: there is one rank alone.
    data_dir: the folder in which the operator keeps data; None: there is none.
    """

    def __init__(self, spec: LoopSpec, context: TrainContext) -> None:
        self.config: dict[str, Any] = dict(spec.train.options)
        self.seed = spec.seed
        self.rank, self.world_size, self.device = context.comm.rank, context.comm.world_size, context.device
        self.process_group = dist.group.WORLD if dist.is_initialized() else None
        self.data_dir: Path | None = context.data_dir
        self.step = 0
        self.tested: dict[str, float] = {}
        self.target_step: int | None = None
        self.was_cancelled = False
        self._is_resized = False
        self._spec, self._context = spec, context
        self._saves = Saves(context, spec.checkpoint.keep)
        self._has_announced = False
        self._resumed_step = 0
        self._newest: dict[str, float] = {}
        self._begun_s = self._reported_s = time.monotonic()
        self._logged_s = 0.0
        self._seconds_before = 0.0

    def report(
        self,
        metrics: Mapping[str, Any],
        *,
        step: int | None = None,
        test: bool = False,
        epoch: float | None = None,
        lr: float | None = None,
        samples: int | None = None,
    ) -> None:
        """Tells how good the model is. Rank 0's word counts; other ranks may call it or not.

        metrics: numbers or tensors of one element, by their names in the job's `train.metrics`.
        step: of the optimizer, from 1; None: one more than the last, or the last if `test`.
        test: whether they are of the test data; then they are compared with the job's target.
        samples: of the step, for the throughput.
        Raises: UserCodeError.
        """
        values = {name: self._number(name, value) for name, value in metrics.items()}
        step = (self.step if test else self.step + 1) if step is None else step
        if step < 1 or (not test and step <= self.step):
            raise UserCodeError(
                f"report needs a step above the last one, {self.step}, got {step}; leave it out to count by ones"
            )
        self._announce()
        self.step = step
        if test:
            self._take_test(values, epoch)
        else:
            self._take_step(values, epoch, lr, samples)

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Collective. Saves the state at the last reported step; rank 0 writes its own, while the loop goes on.

        state: tensors, numbers, texts, lists and dictionaries, as `torch.load(weights_only=True)` takes them.
        Raises: UserCodeError before the first report; StorageError, SupersededError.
        """
        if self.step == 0:
            raise UserCodeError("checkpoint needs a step that was reported; call report first")
        own = {"target_step": self.target_step, "tested": self.tested, "seconds": self._seconds()}
        saved = {"user": state, "step": self.step, "own": own} if self.rank == 0 else None
        self._saves.save(self.step, Snapshot(None, in_host_memory(saved)), is_result=False)

    def resume(self) -> dict[str, Any] | None:
        """Collective. Returns the newest state that was saved, with tensors on the device; None: there is none.

        `step` is then that of the state. Raises: StorageError.
        """
        found = self._saves.newest()
        if found is None and self._spec.init_from is not None:
            return self._from_another_job(self._spec.init_from)
        if found is None:
            self._announce()
            return None
        saved = found[1][0]
        self.step = self._resumed_step = saved["step"]
        self.target_step, self.tested = saved["own"]["target_step"], saved["own"]["tested"]
        self._seconds_before = saved["own"]["seconds"]
        self._announce()
        state: dict[str, Any] = saved["user"]
        return state

    def _from_another_job(self, choice: InitFromCheckpoint) -> dict[str, Any]:
        """Collective. Returns the state that another job saved; its seconds and its target stay that job's own."""
        comm, chosen, failure = self._context.comm, 0, None
        folder = self._context.run_dir.parent / choice.run_dir
        if self.rank == 0:
            try:
                _, chosen = checkpoint_of(folder, choice.step)
            except WorkerError as error:
                failure = error
        chosen, failure = comm.all_gather_object("origin", (chosen, failure))[0]
        if failure is not None:
            raise failure
        _, states = checkpoint_of(folder, chosen)[0].load(chosen, self.device)
        if "user" not in states[0]:
            raise IncompatibleCheckpointError(
                f"{choice.run_dir} is no job with a loop of its own, so its state is not one that a loop saved; name "
                "another in init_from.run_dir"
            )
        self.step = self._resumed_step = states[0]["step"]
        self._announce()
        state: dict[str, Any] = states[0]["user"]
        return state

    def should_stop(self) -> bool:
        """Collective. Returns whether to save a checkpoint and return: a cancelled job, a target that stops it, or
        workers that are to start again in another number; then the function is called anew, and `resume` goes on.

        Raises: SupersededError.
        """
        asked = [stop_code_of(self._context), float(self._stops())]
        codes = torch.tensor(asked, dtype=torch.float64, device=self._context.comm.device)
        self._context.comm.all_reduce("stop request", codes)
        code, reached = codes.tolist()
        request = request_of(code, self._context)
        self.was_cancelled, self._is_resized = request == "cancelled", request == "resized" and not reached
        return request is not None or reached > 0

    def outcome(self) -> Outcome:
        """Collective. Returns the end of the attempt. Rank 0's counts. Raises: SupersededError."""
        self._saves.finish()
        self._announce()
        ended = "resized" if self._is_resized else "succeeded"
        return Outcome(
            result="cancelled" if self.was_cancelled else ended,
            step=self.step,
            metrics=self.tested or self._newest,
            target_step=self.target_step,
            seconds=self._seconds(),
        )

    def close(self) -> None:
        """Gives a checkpoint under way some seconds."""
        self._saves.close()

    def _announce(self) -> None:
        """Reports the start, once: a loop that resumes does so before its first report."""
        if self._has_announced or self.rank > 0:
            return
        self._has_announced = True
        self._context.reporter.report(
            Started(
                spec=self._spec.model_dump(mode="json"),
                seed=self.seed,
                commit=commit(),
                versions=versions(),
                world_size=self.world_size,
                device=device_name(self.device),
                total_steps=self._spec.train.steps,
                steps_per_epoch=None,
                parameters=None,
                resumed_step=self._resumed_step,
                statistics=[],
                plain_parameters={},
                metrics=[
                    Metric(name=name, label=name.replace("_", " ")[:40], better=metric.better, unit=metric.unit)
                    for name, metric in self._spec.train.metrics.items()
                ],
            )
        )

    def _take_step(self, values: dict[str, float], epoch: float | None, lr: float | None, samples: int | None) -> None:
        self._newest = values
        now_s = time.monotonic()
        rate = samples / max(now_s - self._reported_s, 1e-9) if samples is not None else None
        self._reported_s = now_s
        record = StepRecord(step=self.step, epoch=epoch, time_s=time.time(), metrics=values, lr=lr, samples_per_s=rate)
        self._context.reporter.report(record)
        if self.rank == 0 and now_s - self._logged_s >= PROGRESS_S:
            self._logged_s = now_s
            self._log("training", values)

    def _take_test(self, values: dict[str, float], epoch: float | None) -> None:
        self.tested = values
        report, target = self._context.reporter.report, self._spec.target
        report(Evaluation(step=self.step, epoch=epoch, metrics=values))
        if self.rank == 0:
            self._log("test", values)
        if target is None or self.target_step is not None or target.metric not in values:
            return
        value = values[target.metric]
        if is_reached(target, self._spec.train.metrics[target.metric].better, value):
            self.target_step = self.step
            report(TargetReached(step=self.step, metrics={target.metric: value}))

    def _number(self, name: str, value: Any) -> float:
        known = self._spec.train.metrics
        if name not in known:
            raise UserCodeError(f"report got {name!r}, and train.metrics lists {', '.join(known)}; add it to the job")
        try:
            return float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserCodeError(f"report needs a number for {name!r}, got {type(value).__name__}") from error

    def _stops(self) -> bool:
        target = self._spec.target
        return self.rank == 0 and target is not None and target.stop and self.target_step is not None

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._begun_s

    def _log(self, which: str, values: Mapping[str, float]) -> None:
        shown = metric_words(which, {name: value for name, value in values.items() if math.isfinite(value)})
        log.info("%s", "  ".join([f"step {self.step}/{self._spec.train.steps or '?'}", *shown]))


def train_own_loop(spec: LoopSpec, context: TrainContext) -> Outcome:
    """Collective. Returns the outcome of the user's loop. Raises: WorkerError; the error of a peer's death as it is."""
    torch.set_num_threads(spec.resources.threads_per_worker)
    seed_everything(spec.seed)
    function = load_function(spec.train.function)
    own = LoopContext(spec, context)
    try:
        function(own)
        outcome = own.outcome()
    except (WorkerError, torch.OutOfMemoryError, CollectiveError):
        raise
    except Exception as error:
        if context.comm.world_size > 1 and _is_of_a_peer(error):
            raise
        log.exception("%s failed", spec.train.function)
        raise UserCodeError(f"{spec.train.function!r} failed with {type(error).__name__}: {error}") from error
    finally:
        own.close()
    return outcome


def _is_of_a_peer(error: Exception) -> bool:
    """Returns whether a collective failed, most likely since another rank has died: a restart mends that."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in OF_A_PEER)
    )

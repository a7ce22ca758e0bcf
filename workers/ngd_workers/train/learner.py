"""The model and its optimizer on one rank: gradients of a global batch, one update, one pass over the test data.

The job's engine drives both; it or the optimizer averages gradients over ranks, never both.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, part_of
from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.checkpoint_files import ModelFacts, Score, TensorForm
from ngd_workers.contract.errors import IncompatibleCheckpointError, UserCodeError, WorkerError
from ngd_workers.contract.spec import JobSpec
from ngd_workers.data import Dataset
from ngd_workers.tasks.base import Batch, Result, Task
from ngd_workers.train.checkpoints import Snapshot
from ngd_workers.train.engines import engine_of
from ngd_workers.train.loading import MicroBatch, placed
from ngd_workers.train.optimizers import build_optimizer, chooses_lr, job_errors, step_stats
from ngd_workers.train.saves import in_host_memory
from ngd_workers.train.totals import Totals
from ngd_workers.train.transforms import build_transform

__all__ = ["Learner", "check_fit", "load_weights", "trainable"]


def check_fit(model: nn.Module, task: Task, batch: Batch) -> list[TensorForm] | None:
    """Checks, before the first step, that the task can test the model on this batch. Raises: UserCodeError.

    Returns the inputs of the model's first call; None if they are not tensors alone.
    """
    model.eval()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = model.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    try:
        with torch.no_grad():
            result = task.test_batch(model, batch)
    except WorkerError:
        raise
    except Exception as error:  # a user's model may raise anything
        raise UserCodeError(f"the model failed on {_described(batch)} with {type(error).__name__}: {error}") from error
    finally:
        handle.remove()
    model.train()
    if not isinstance(result, Result) or not isinstance(result.loss, Tensor) or result.loss.ndim > 0:
        raise UserCodeError("the task must return a ngd_workers.tasks.base.Result whose loss is a scalar tensor")
    if not calls or calls[0][1] or not all(isinstance(given, Tensor) for given in calls[0][0]):
        return None
    return [TensorForm(shape=list(x.shape), dtype=str(x.dtype).removeprefix("torch.")) for x in calls[0][0]]


class Learner:
    """Collective: every rank must build it and call its methods in the same order, on the same global batches."""

    def __init__(
        self, model: nn.Module, task: Task, dataset: Dataset, spec: JobSpec, comm: Communicator, device: torch.device
    ) -> None:
        self.task, self.device = task, device
        self._dataset, self._comm = dataset, comm
        share_weights(model.to(device), comm)
        self._transform = build_transform(model, spec)
        self._engine = engine_of(spec)(model, spec, comm, device)
        self._engine.wrap(lambda driven, **keywords: build_optimizer(driven, spec, task, **keywords))
        self.model, self.optimizer = self._engine.model, self._engine.optimizer
        if isinstance(self.optimizer, NGD):
            self.optimizer.watch()
        self._weights: list[Tensor | float] = []
        self._objective_fraction = getattr(spec.optimizer, "objective_fraction", 1.0)

    def backward(self, micro_batches: Sequence[MicroBatch]) -> Totals:
        """Returns the totals of this rank's samples; leaves the gradient of the mean over the global batch.

        Collective if micro-batches may differ in their counts. Raises: UserCodeError, SpecError.
        """
        totals = Totals(self.device)
        self._weights = self._weights_of(micro_batches)
        for index, (micro_batch, weight) in enumerate(zip(micro_batches, self._weights, strict=True)):
            with self._engine.accumulating(is_last=index == len(micro_batches) - 1):
                with self._counted(micro_batch.samples):
                    result = self._result(self._engine.forward, self._placed(micro_batch))
                if isinstance(self.optimizer, NGD) and result.output is not None:
                    with job_errors():
                        self.optimizer.fisher_backward(result.output, ignored=result.ignored)
                self._engine.backward(result.loss * weight)
            totals.add(result, micro_batch)
        return totals

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> None:
        """Collective under NGD, or a transform. Steps with the gradients that `backward` has left for these batches.

        lr: the schedule's; not used if the optimizer chooses its own.
        Raises: UserCodeError, SpecError, NonFiniteLossError.
        """
        arguments: dict[str, Any] = {}
        with job_errors():
            if isinstance(self.optimizer, NGD) and self.optimizer.config.needs_objective:
                parts, weights = self._objective_parts(micro_batches)
                batches = [self._placed(part) for part in parts]
                arguments["objective"] = lambda: self.objective(batches, weights)
            self._engine.update(None if chooses_lr(self.optimizer) else lr, **arguments)
            if self._transform is not None:
                self._transform.step(self.optimizer)

    def objective(self, batches: Sequence[Batch], weights: Sequence[Tensor | float]) -> tuple[Tensor, Tensor]:
        """Returns the loss of these batches, and the output that it is made of, differentiable.

        They are all micro-batches, or a part of each: with one of them alone the step would depend on the division of
        the batch.
        The division is that of `backward`, since batch norm depends on it. Memory stays that of one micro-batch: if
        the caller differentiates through the model, the activations are computed again.
        """
        if len(batches) == 1:
            result = self._result(self._engine.forward, batches[0])
            return result.loss * weights[0], _output_of(result)
        recomputed = _Recomputed(self._engine.forward)
        outputs = [_output_of(self._result(recomputed, batch)) for batch in batches]
        joined = torch.cat([output.flatten() for output in outputs])  # their lengths may differ
        pieces = joined.split([output.numel() for output in outputs])
        losses = [
            self._result(_Returns(piece.view(output.shape)), batch).loss * weight
            for piece, output, batch, weight in zip(pieces, outputs, batches, weights, strict=True)
        ]
        return torch.stack(losses).sum(), joined

    def bytes_sent(self) -> dict[str, int]:
        """Returns the bytes that this rank has sent in the newest step, by kind: the engine's and the optimizer's."""
        return {**self._engine.gradient_bytes, **step_stats(self.optimizer).bytes_sent}

    def evaluate(self, batches: Iterable[MicroBatch]) -> Totals:
        """Collective. Returns the totals of the test data over all ranks; each rank gives its own batches of them."""
        self.average_buffers()
        totals = Totals(self.device)
        self.model.eval()
        with torch.no_grad():
            for batch in batches:
                result = self._tested(self._placed(batch))
                totals.add(result, batch)
        self.model.train()
        totals.reduce(self._comm, "evaluation")
        return totals

    def average_buffers(self) -> None:
        """Collective. Gives all ranks the mean of their running statistics, since each has seen other samples."""
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                self._comm.all_reduce(f"buffer {name}", buffer)
                buffer /= self._comm.world_size

    def snapshot(self, progress: dict[str, Any], score: Score | None, facts: ModelFacts | None) -> Snapshot:
        """Collective. Returns this rank's part of a checkpoint, in copies, so that training may go on.

        Rank 0 has the weights, the progress and what of the optimizer is the same on all ranks; a rank has the layers
        of which it owns NGD's statistics.
        """
        self.average_buffers()
        is_first, is_ngd = self._comm.rank == 0, isinstance(self.optimizer, NGD)
        num_ranks = self._comm.world_size if is_ngd else 1
        part, transform = self._engine.optimizer_state(), self._transform
        model = self._engine.weights() if transform is None else transform.plain_state_dict()
        if not is_first:
            own = {} if not is_ngd else {"optimizer": part} if "ranges" in part["ngd"] else part["ngd"]
            kept = {name: own[name] for name in ("optimizer", "layers") if name in own}
            return Snapshot(None, in_host_memory(kept), num_ranks)
        weights = {name: value for name, value in model.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in model.items() if name not in weights}
        state = {"optimizer": part, "progress": progress, "model_extra": others, "loss_scale": self._engine.loss_scale}
        if transform is not None:
            state["transform"] = transform.state_dict()
        return Snapshot(in_host_memory(weights), in_host_memory(state), num_ranks, score, facts)

    def load(self, states: list[Any]) -> dict[str, Any]:
        """Restores the optimizer from the snapshots of all ranks, of any number of them. Returns the progress.

        Raises: IncompatibleCheckpointError.
        """
        with _misfits():
            state, *others = states
            optimizer = state["optimizer"]
            if others:
                optimizer = NGD.joined([optimizer, *(other.get("optimizer", {"ngd": other}) for other in others)])
            self._engine.load_optimizer_state(optimizer)
            if self._transform is not None:
                self._transform.load_state_dict(state["transform"])
            self._engine.load_loss_scale(state.get("loss_scale", {}))
            progress: dict[str, Any] = state["progress"]
            return progress

    def _objective_parts(
        self, micro_batches: Sequence[MicroBatch]
    ) -> tuple[Sequence[MicroBatch], Sequence[Tensor | float]]:
        """Returns the samples that the objective is of, and their weights. Collective as `backward` is."""
        if self._objective_fraction == 1:
            return micro_batches, self._weights
        parts = []
        for micro_batch in micro_batches:
            # The numbers of the samples are cut with them, and counted.
            whole, samples = (micro_batch.content, torch.arange(micro_batch.samples)), micro_batch.samples
            content, numbers = part_of(whole, self._objective_fraction, samples=samples)
            parts.append(replace(micro_batch, content=content, samples=len(numbers)))
        return parts, self._weights_of(parts)

    def _weights_of(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor | float]:
        """Returns the weight of each mean loss in this rank's: the mean over ranks is that of the global batch."""
        if not (self.task.counts_vary or self._dataset.skips_bad_samples):
            return [1 / len(micro_batches)] * len(micro_batches)
        counts = torch.stack([self._count(micro_batch) for micro_batch in micro_batches])
        total = counts.sum().to(self.device)
        self._comm.all_reduce("count of the batch", total)
        return list((counts.to(self.device) * (self._comm.world_size / total)).float())

    def _count(self, micro_batch: MicroBatch) -> Tensor:
        count = self.task.count(micro_batch.content) if self.task.counts_vary else micro_batch.samples
        return torch.as_tensor(count, dtype=torch.float64, device="cpu")

    def _placed(self, micro_batch: MicroBatch) -> Batch:
        return placed(micro_batch.content, self._dataset, self.device)

    def _counted(self, samples: int) -> contextlib.AbstractContextManager[None]:
        """Says how many samples a forward pass has: NGD need not guess."""
        return self.optimizer.samples(samples) if isinstance(self.optimizer, NGD) else contextlib.nullcontext()

    def _result(self, model: nn.Module, batch: Batch) -> Result:
        try:
            with self._engine.precise():
                return self.task.train_batch(model, batch)
        except WorkerError:
            raise
        except Exception as error:
            # If a forward pass talks to other ranks, its error may be a peer's death, and a restart mends that.
            if self._engine.talks_in_forward or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserCodeError(f"the model failed in training with {type(error).__name__}: {error}") from error

    def _tested(self, batch: Batch) -> Result:
        try:
            with self._engine.precise():
                return self.task.test_batch(self.model, batch)
        except (WorkerError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._engine.talks_in_forward and self.model is self._engine.forward:
                raise
            raise UserCodeError(f"the model failed in testing with {type(error).__name__}: {error}") from error


class _Recomputed(nn.Module):
    """A model whose activations are computed again where they are needed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._model, *args, use_reentrant=False, **kwargs)


class _Returns(nn.Module):
    """In place of a model that has run: returns its output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._output


def load_weights(model: nn.Module, weights: dict[str, Tensor] | None, states: list[Any]) -> None:
    """Gives a model the weights of a snapshot, before an engine drives it. Raises: IncompatibleCheckpointError."""
    with _misfits():
        model.load_state_dict(states[0]["model"] if weights is None else weights | states[0]["model_extra"])


@contextlib.contextmanager
def _misfits() -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise IncompatibleCheckpointError(
            f"the checkpoint doesn't fit the job's model and optimizer: {error}; use another run directory"
        ) from error


def share_weights(model: nn.Module, comm: Communicator) -> None:
    """Collective. Gives all ranks the weights of rank 0."""
    for name, tensor in model.state_dict().items():
        comm.broadcast(f"initial {name}", tensor)


def trainable(model: nn.Module) -> int:
    """Returns the number of the model's trainable weights."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _output_of(result: Result) -> Tensor:
    if result.output is None:
        raise UserCodeError(
            "optimizer ngd needs the task's output to choose its step length or damping: return it in Result, or leave "
            "step_length and damping_rule out"
        )
    return result.output


def _described(batch: Batch) -> str:
    parts = batch if isinstance(batch, tuple | list) else [batch]
    shapes = [str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    return f"a batch of {', '.join(shapes)}"

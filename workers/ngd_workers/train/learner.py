"""The model and its optimizer on one rank: gradients of a global batch, one update, one pass over the test data.

Under NGD the optimizer averages gradients over ranks, else DistributedDataParallel does; never both.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD
from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.errors import IncompatibleCheckpointError, UserCodeError
from ngd_workers.contract.spec import JobSpec
from ngd_workers.data import Dataset
from ngd_workers.train.optimizers import build_optimizer, chooses_lr, job_errors

__all__ = ["Learner", "Score", "check_model", "trainable"]

EVALUATION_BATCH = 1000  # bounds memory; the result does not depend on it
TRIAL_BATCH = 2


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss and share of samples classified correctly."""

    loss: float
    accuracy: float


def check_model(model: nn.Module, dataset: Dataset) -> None:
    """Checks, before the first step, that the model maps images to one logit per class. Raises: UserCodeError."""
    model.eval()
    x = dataset.train_x[:TRIAL_BATCH]
    try:
        with torch.no_grad():
            logits = model(x)
    except Exception as error:  # a user's model may raise anything
        raise UserCodeError(
            f"the model failed on images of shape {tuple(x.shape)} with {type(error).__name__}: {error}"
        ) from error
    model.train()
    wanted = (len(x), dataset.shape.classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserCodeError(f"the model must return logits of shape {wanted}, one per class, got {got}")


class Learner:
    """Collective: every rank must build it and call its methods in the same order, on the same global batches."""

    def __init__(self, model: nn.Module, spec: JobSpec, comm: Communicator, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device
        self._comm = comm
        self._micro_size = spec.micro_size
        for name, tensor in model.state_dict().items():
            comm.broadcast(f"initial {name}", tensor)
        self.optimizer = build_optimizer(model, spec)
        self._averages_gradients = spec.optimizer.kind == "ngd" or comm.world_size == 1
        self._forward: nn.Module = model
        if not self._averages_gradients:
            self._forward = DistributedDataParallel(model)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns [sum of losses, number correct] over this rank's samples, float64; leaves the mean's gradient.

        Raises: UserCodeError, SpecError.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        micro_batches = list(zip(x.split(self._micro_size), y.split(self._micro_size), strict=True))
        for index, (micro_x, micro_y) in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else self._no_averaging():
                logits = self._logits(micro_x)
                if isinstance(self.optimizer, NGD):
                    with job_errors():
                        self.optimizer.fisher_backward(logits)
                loss = F.cross_entropy(logits, micro_y)
                (loss / len(micro_batches)).backward()
            totals += _totals(loss.detach() * len(micro_y), logits, micro_y)
        return totals

    def update(self, x: Tensor, y: Tensor, lr: float) -> None:
        """Collective under NGD. Takes one optimizer step with the gradients that `backward` has left for x and y.

        lr: the schedule's; not used if the optimizer chooses its own.
        Raises: UserCodeError, SpecError, NonFiniteLossError.
        """
        if not chooses_lr(self.optimizer):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        with job_errors():
            if isinstance(self.optimizer, NGD) and self.optimizer.config.needs_objective:
                self.optimizer.step(objective=lambda: self.objective(x, y))
            else:
                self.optimizer.step()
        self.optimizer.zero_grad()

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean loss over this rank's samples and their logits, differentiable, as in `backward`.

        The loss covers all micro-batches: with one of them alone the step would depend on the division of the batch.
        The division is that of `backward`, since batch norm depends on it. Memory stays that of one micro-batch: if
        the caller differentiates through the model, the activations are computed again.
        """
        micro_batches = x.split(self._micro_size)
        if len(micro_batches) == 1:
            logits = self._logits(x)
        else:
            logits = torch.cat([self._logits(micro_x, self._recomputed) for micro_x in micro_batches])
        return F.cross_entropy(logits, y), logits

    def gradient_bytes(self) -> dict[str, int]:
        """Returns the bytes that this rank sends per step to average gradients outside the optimizer, in a ring."""
        if self._averages_gradients:
            return {}
        size = sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)
        return {"gradients": 2 * size * (self._comm.world_size - 1) // self._comm.world_size}

    def evaluate(self, dataset: Dataset) -> Score:
        """Collective. Returns the score on the test data; each rank takes its share of them."""
        self.average_buffers()
        share = slice(self._comm.rank, None, self._comm.world_size)
        x, y = dataset.test_x[share], dataset.test_y[share]
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        with torch.no_grad():
            for part_x, part_y in zip(x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True):
                if len(part_y):  # a rank beyond the last sample has an empty part
                    logits = self.model(part_x)
                    totals += _totals(F.cross_entropy(logits, part_y, reduction="sum"), logits, part_y)
        self.model.train()
        self._comm.all_reduce("evaluation", totals)
        loss, correct = (totals / len(dataset.test_y)).tolist()
        return Score(loss, correct)

    def average_buffers(self) -> None:
        """Collective. Gives all ranks the mean of their running statistics, since each has seen other samples."""
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                self._comm.all_reduce(f"buffer {name}", buffer)
                buffer /= self._comm.world_size

    def state_dict(self) -> dict[str, Any]:
        """Collective. Returns model and optimizer, the same on every rank and at any number of ranks."""
        self.average_buffers()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state that `state_dict` returned. Raises: IncompatibleCheckpointError."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise IncompatibleCheckpointError(
                f"the checkpoint doesn't fit the job's model and optimizer: {error}; use another run directory"
            ) from error

    def _recomputed(self, x: Tensor) -> Any:
        return checkpoint(self._forward, x, use_reentrant=False)

    def _logits(self, x: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Tensor:
        try:
            logits: Tensor = (forward or self._forward)(x)
        except Exception as error:
            # DDP's forward talks to other ranks: its error may be a peer's death, and a restart mends that.
            if isinstance(self._forward, DistributedDataParallel) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserCodeError(f"the model failed in training with {type(error).__name__}: {error}") from error
        return logits

    def _no_averaging(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return contextlib.nullcontext()


def trainable(model: nn.Module) -> int:
    """Returns the number of the model's trainable weights."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _totals(loss_sum: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    return torch.stack((loss_sum, (logits.detach().argmax(1) == y).sum()))

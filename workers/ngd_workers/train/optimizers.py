"""Builds a job's optimizer, reads the telemetry of its newest step, and turns its errors into those of a job."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn, optim

from ngd_dist import NGD
from ngd_dist.config import Categorical, Empirical, QuadraticModel
from ngd_dist.errors import CaptureError, ConfigError, InversionError, NgdError, NonFiniteError
from ngd_dist.telemetry import StepStats
from ngd_workers.contract.errors import NonFiniteLossError, SpecError, UserCodeError
from ngd_workers.contract.spec import SGD, AdamW, JobSpec, NGDOptimizer, Plain
from ngd_workers.tasks.base import Task

__all__ = ["build_optimizer", "chooses_lr", "job_errors", "step_stats"]


def build_optimizer(model: nn.Module, spec: JobSpec, task: Task, **keywords: Any) -> optim.Optimizer:
    """Collective for NGD. Returns the optimizer of a model on its device, in its engine's wrapper.

    keywords: of `NGD`, for that alone. Raises: SpecError.
    """
    return BUILDERS[spec.optimizer.kind](model, spec, task, **keywords)


def step_stats(optimizer: optim.Optimizer) -> StepStats:
    """Returns the telemetry of the newest step; it is empty for torch's own optimizers."""
    return optimizer.stats if isinstance(optimizer, NGD) else StepStats()


def chooses_lr(optimizer: optim.Optimizer) -> bool:
    """Returns whether the optimizer sets lr and momentum in each step, so that the loop must not."""
    return isinstance(optimizer, NGD) and isinstance(optimizer.config.length, QuadraticModel)


@contextmanager
def job_errors() -> Iterator[None]:
    """Raises an optimizer's errors about the model, the settings and the gradients as WorkerErrors."""
    try:
        yield
    except CaptureError as error:
        raise UserCodeError(f"the model doesn't fit optimizer ngd: {error}") from error
    except ConfigError as error:
        raise SpecError(f"optimizer ngd doesn't fit the model: {error}") from error
    except (NonFiniteError, InversionError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise NonFiniteLossError(f"training diverged: {error}") from error


def _ngd(model: nn.Module, spec: JobSpec, task: Task, **keywords: Any) -> optim.Optimizer:
    assert isinstance(spec.optimizer, NGDOptimizer)
    likelihood = task.likelihood
    if likelihood is None and not isinstance(spec.optimizer.fisher, Empirical):
        raise SpecError(
            f"optimizer.fisher {spec.optimizer.fisher.kind} draws labels from the model's prediction, and task "
            f"{spec.task.kind} has no likelihood; take fisher empirical, or give the task one"
        )
    config = spec.optimizer.config(micro_batches=spec.micro_batches, likelihood=likelihood or Categorical())
    try:
        return NGD(model, config, **keywords)
    except NgdError as error:
        raise SpecError(f"optimizer ngd doesn't fit the model: {error}") from error


def _sgd(model: nn.Module, spec: JobSpec, task: Task) -> optim.Optimizer:
    assert isinstance(spec.optimizer, SGD)
    return optim.SGD(model.parameters(), **spec.optimizer.model_dump(exclude={"kind"}))


def _adamw(model: nn.Module, spec: JobSpec, task: Task) -> optim.Optimizer:
    choice = spec.optimizer
    assert isinstance(choice, AdamW)
    return optim.AdamW(
        model.parameters(),
        lr=choice.lr,
        betas=(choice.beta1, choice.beta2),
        eps=choice.eps,
        weight_decay=choice.weight_decay,
    )


def _of_library(model: nn.Module, spec: JobSpec, task: Task) -> optim.Optimizer:
    assert isinstance(spec.optimizer, Plain)
    built: optim.Optimizer = import_module("ngd_workers.train.baselines").build(model, spec.optimizer)
    return built


OF_LIBRARY = ("lars", "lamb", "muon", "soap", "shampoo")
BUILDERS: dict[str, Callable[..., optim.Optimizer]] = {
    "ngd": _ngd,
    "sgd": _sgd,
    "adamw": _adamw,
    **dict.fromkeys(OF_LIBRARY, _of_library),
}

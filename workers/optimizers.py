"""OptimizerSpec -> torch.optim.Optimizer, and what its newest step did."""

from collections.abc import Callable

from torch import nn, optim

from ngd_dist import NGD, NGDConfig
from ngd_dist.errors import NgdError
from ngd_dist.telemetry import StepStats
from workers.errors import SpecError
from workers.spec import SGD, AdamW, JobSpec

__all__ = ["build_optimizer", "step_stats"]


def build_optimizer(model: nn.Module, spec: JobSpec) -> optim.Optimizer:
    """Collective for NGD. Returns the optimizer of a bare model on its device. Raises: SpecError."""
    return BUILDERS[spec.optimizer.kind](model, spec)


def step_stats(optimizer: optim.Optimizer) -> StepStats:
    """Returns what the newest step did; torch's own optimizers have neither statistics nor phases."""
    return optimizer.stats if isinstance(optimizer, NGD) else StepStats()


def _ngd(model: nn.Module, spec: JobSpec) -> optim.Optimizer:
    settings = spec.optimizer.model_dump(exclude={"kind"}) | {"micro_batches": spec.micro_batches}
    try:
        return NGD(model, NGDConfig.model_validate(settings))
    except NgdError as error:
        raise SpecError(f"optimizer ngd doesn't fit the model: {error}") from error


def _sgd(model: nn.Module, spec: JobSpec) -> optim.Optimizer:
    assert isinstance(spec.optimizer, SGD)
    return optim.SGD(model.parameters(), **spec.optimizer.model_dump(exclude={"kind"}))


def _adamw(model: nn.Module, spec: JobSpec) -> optim.Optimizer:
    choice = spec.optimizer
    assert isinstance(choice, AdamW)
    return optim.AdamW(
        model.parameters(),
        lr=choice.lr,
        betas=(choice.beta1, choice.beta2),
        eps=choice.eps,
        weight_decay=choice.weight_decay,
    )


BUILDERS: dict[str, Callable[[nn.Module, JobSpec], optim.Optimizer]] = {"ngd": _ngd, "sgd": _sgd, "adamw": _adamw}

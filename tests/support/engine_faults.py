"""What ranks of an engine do beside training well: they skip, they refuse. Each function runs on every rank."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ngd_dist import NGD, NGDConfig, Preconditioner, ShardedState
from ngd_dist.config import KLClip, LayerWise, LevenbergMarquardt, MonteCarlo, QuadraticModel
from ngd_dist.errors import NgdError
from tests.support.engines import STEPS, Case, Run, new_net

HALF = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 1000}}
UNFIT: dict[str, NGDConfig] = {
    "layer_wise": NGDConfig(step_length=LayerWise()),
    "quadratic_model": NGDConfig(step_length=QuadraticModel()),
    "levenberg_marquardt": NGDConfig(damping_rule=LevenbergMarquardt()),
    "statistics_fraction": NGDConfig(statistics_fraction=0.5, fisher=MonteCarlo()),
    "loss_reduction": NGDConfig(loss_reduction="sum"),
}


def refusal(call: Callable[[], object]) -> str:
    """Returns the message of the error that the call raises; nothing if it raises none."""
    try:
        call()
    except NgdError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def overflowing(engine: str) -> dict[str, Any]:
    """Trains in float16 from a scale that overflows; returns the counts of both, and the weights."""
    run = Run(engine, Case({"momentum": 0.0}, deepspeed=HALF))
    applied = []
    for number in range(STEPS * 2):
        run.step(number)
        if run.model.was_step_applied():
            applied.append(number)
    stats = run.optimizer.stats
    outcome = {
        "counts": (stats.step, stats.skipped_steps, run.model.global_steps, run.model.skipped_steps),
        "applied": applied,
        "weights": run.weights(),
    }
    run.close()
    return outcome


def with_a_bad_piece(rank: int) -> dict[str, Any]:
    """Steps with a NaN in one rank's piece of the gradient, under both settings; then steps on."""
    outcome: dict[str, Any] = {}
    for setting in ("skip", "raise"):
        run = Run("fsdp2", Case({"non_finite": setting}))
        before = run.weights()
        step = run.optimizer.step

        def spoiled(step: Callable[[], None] = step, run: Run = run) -> None:
            if rank == 1:
                run.net.head.weight.grad.to_local().fill_(torch.nan)
            step()

        run.optimizer.step = spoiled
        message = refusal(lambda run=run: run.step(0))
        run.optimizer.step = step
        run.optimizer.zero_grad()
        after = run.weights()
        run.step(1)
        outcome[setting] = (message, before, after, run.weights(), run.optimizer.stats.skipped_steps)
    return outcome


def preconditioned_with_a_bad_piece(rank: int) -> tuple[bool, list[float]]:
    """Returns whether a step with a NaN in one rank's piece made directions, and the largest entries of the pieces."""
    run = Run("fsdp2", Case({"non_finite": "skip"}, inner=lambda parameters: torch.optim.SGD(parameters, lr=0.1)))
    inner_step, taken = run.optimizer.step, list[tuple[bool, list[float]]]()

    def spoiled() -> bool:
        if rank == 1:
            run.net.head.weight.grad.to_local().fill_(torch.nan)
        made = inner_step()
        pieces = [p.grad.to_local() for p in run.net.parameters() if p.grad is not None]
        taken.append((made, [float(piece.abs().max()) for piece in pieces if piece.numel()]))
        return bool(made)

    run.optimizer.step = spoiled
    run.step(0)
    return taken[0]


def refused_by_fsdp2() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    run = Run("fsdp2", Case())
    refusals = {name: refusal(lambda config=config: NGD(run.net, config)) for name, config in UNFIT.items()}
    part = new_net(torch.float64)
    fully_shard(part.hidden)
    refusals["a part alone"] = refusal(lambda: NGD(part))
    hybrid = nn.Linear(4, 4)
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    refusals["hybrid"] = refusal(lambda: NGD(hybrid))
    parallel = parallelize_module(nn.Linear(4, 4), init_device_mesh("cpu", (2,)), ColwiseParallel())
    refusals["tensor parallel"] = refusal(lambda: NGD(parallel))
    refusals["foreign"] = refusal(
        lambda: NGD(run.net, param_groups=[{"params": [*run.net.parameters(), nn.Parameter(torch.ones(2))]}])
    )
    refusals["scaler"] = refusal(lambda: NGD(run.net, grad_scaler=torch.amp.GradScaler("cpu")))
    refusals["dcp"] = refusal(lambda: ShardedState(run.optimizer))
    return refusals


def refused_by_deepspeed(engine: str) -> dict[str, str]:
    from ngd_dist.engines.deepspeed import initialize

    run = Run(engine, Case())
    model, net = run.model, run.net
    unfit = UNFIT | {"micro_batches": NGDConfig(micro_batches=3)}
    refusals = {name: refusal(lambda config=config: NGD(model, config)) for name, config in unfit.items()}
    if engine == "zero3":
        refusals["fisher"] = refusal(lambda: NGD(model, NGDConfig(fisher=MonteCarlo())))
    if engine != "zero0":
        refusals["not told"] = refusal(lambda: NGD(net))
    refusals["step"] = refusal(run.optimizer.step)
    refusals["preconditioner"] = refusal(lambda: Preconditioner(model))
    refusals["clipping"] = refusal(lambda: initialize(new_net(torch.float32), {"gradient_clipping": 1.0}))
    run.close()
    run = Run(engine, Case({"clip": KLClip()}, inner=lambda params: torch.optim.SGD(params, lr=0.25)))
    refusals["ngd"] = refusal(lambda: NGD(run.model))
    run.step(0)
    refusals["lr of the inner optimizer"] = str(run.optimizer.stats.lr)
    run.close()
    return refusals


def clipped(engine: str) -> str:
    """Returns the refusal of an engine that was initialised without our function, with DeepSpeed's default of 1.0."""
    import deepspeed

    from ngd_dist.engines import Inner

    config = {"train_micro_batch_size_per_gpu": 8, "zero_allow_untested_optimizer": True}
    config |= {"zero_optimization": {"stage": int(engine[-1])}}
    model, *_ = deepspeed.initialize(
        model=new_net(torch.float32), optimizer=Inner, config=config, dist_init_required=False
    )
    message = refusal(lambda: NGD(model))
    model.destroy()
    return message

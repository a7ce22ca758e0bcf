"""START HERE. `NGD.step()` is one step of distributed natural gradient descent in six lines."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import checkpoint, update
from ngd_dist.capture import Capture
from ngd_dist.comm import Communicator
from ngd_dist.config import NGDConfig, OwnerSharded, Single
from ngd_dist.coverage import cover
from ngd_dist.curvature import Curvature
from ngd_dist.errors import CaptureError, CheckpointError, ConfigError
from ngd_dist.inversion import Ending
from ngd_dist.placement import longest_first
from ngd_dist.preconditioners import preconditioner_for
from ngd_dist.staleness import Schedule, Verdict
from ngd_dist.statistics import Key
from ngd_dist.strategies import STRATEGIES, Collected, Local, Report, Strategy
from ngd_dist.telemetry import Refresh, StepStats, Stopwatch

__all__ = ["NGD"]

logger = logging.getLogger(__name__)


class NGD(torch.optim.Optimizer):
    """SP-NGD as a torch optimizer: preconditions covered layers, takes a plain gradient step elsewhere.

    model: every rank has the same weights, and the first dimension of what its layers read counts samples. Bare, or
        wrapped in DistributedDataParallel; for a bare model the strategy averages the gradients over ranks, for a
        wrapped one DDP has.
    config: the mathematics; see `NGDConfig`.
    param_groups: as for any torch optimizer, with lr, momentum, weight_decay and damping; default: one group with all
        trainable parameters. Parameters in no group are left alone. A layer's damping is that of its weight's group.
    process_group: the ranks that share a batch; default: the whole world.

    Collective: every rank calls the constructor, `step`, `state_dict` and `load_state_dict`, in the same order.
    Raises: ConfigError for settings that contradict the model or the group.
    """

    _step_supports_amp_scaling = True  # a GradScaler then shows itself in `step`, which refuses it

    def __init__(
        self,
        model: nn.Module,
        config: NGDConfig | None = None,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config = config or NGDConfig()
        bare = _unwrap(model)
        trainable = [p for p in bare.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError("the model has no trainable parameter; NGD needs at least one")
        self._is_built = False
        defaults = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay", "damping")}
        super().__init__(trainable if param_groups is None else param_groups, defaults)
        self._is_built = True
        updated = [p for group in self.param_groups for p in group["params"]]
        self.layers, self.plain_parameters = cover(bare, set(updated))
        self._layer = {layer.name: layer for layer in self.layers}
        covered = {p for layer in self.layers for p in layer.parameters}
        self._plain = [p for p in updated if p not in covered]

        self.stats = StepStats()
        self._unseen: set[str] = set()
        self._stopwatch = Stopwatch()
        self._comm = Communicator(process_group)
        self._device = trainable[0].device
        self._preconditioners = {
            layer.name: preconditioner_for(layer.shape, config.preconditioner) for layer in self.layers
        }
        costs = {name: preconditioner.refresh_flops() for name, preconditioner in self._preconditioners.items()}
        self._strategy = self._build_strategy(costs, is_averaged_by_ddp=bare is not model)
        self._report_plain(set(bare.parameters()))
        keys = [Key(name, spec.name) for name, p in self._preconditioners.items() for spec in p.statistics]
        self._schedule = Schedule(costs, keys, config.staleness, config.stagger)
        self._curvature = Curvature(self.layers, self._preconditioners, self._strategy, config, self._damping)
        self._capture = Capture(
            self.layers,
            self._preconditioners,
            micro_batches=config.micro_batches,
            loss_reduction=config.loss_reduction,
            stopwatch=self._stopwatch,
        )
        self._arm(1)

    @property
    def statistic_names(self) -> list[str]:
        """Returns "layer.statistic" for every statistic, in the order of `stats.ages` and `stats.intervals`."""
        return [str(key) for key in self._schedule.tracks]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Collective. Updates the parameters from their gradients; returns the closure's loss, if one is given.

        A parameter without a gradient counts as having a zero one. Raises: CaptureError, on every rank, if a layer was
        not differentiated once per micro-batch; CollectiveError.
        """
        if hasattr(self, "found_inf"):
            raise ConfigError("NGD can't tell the scale of a GradScaler's gradients; use bfloat16 autocast without one")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due, phase = self._schedule.due(self.stats.step + 1), self._stopwatch.phase
        with torch.autocast(self._device.type, enabled=False):
            with phase("reduce"):
                means = self._collect(due)
            with phase("refresh"):
                reports = self._curvature.refresh(due, means)
            with phase("apply"):
                directions = {name: self._curvature.apply(name, gradient) for name, gradient in means.gradients.items()}
            with phase("publish"):
                directions, reports = self._strategy.publish(directions, reports, due)
            self._check_counts(reports)
            with phase("update"):
                update.apply_(self.param_groups, self._by_parameter(directions, means.plain), self.state)
        self._finish(due, reports)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Collective. Returns the whole state on every rank: torch's, and under "ngd" the layers' by name."""
        mine = [key for key in self._schedule.tracks if self._strategy.reports(key.layer)]
        return super().state_dict() | {
            "ngd": checkpoint.gather(
                self._comm,
                {key: self._curvature.statistics[key] for key in mine},
                {key.layer: self._curvature.caches[key.layer] for key in mine},
                self._schedule,
                self.stats.step,
                self.stats.failed_inversions,
            )
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state saved at any world size. Raises: CheckpointError if it is of another model or kind."""
        if "ngd" not in state_dict:
            raise CheckpointError(f"an NGD state has the key 'ngd', got {sorted(state_dict)}; was it saved by NGD?")
        saved = state_dict["ngd"]
        checkpoint.check(saved, {key: statistic.spec for key, statistic in self._curvature.statistics.items()})
        try:
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "ngd"})
        except ValueError as error:
            raise CheckpointError(f"the state's param_groups don't fit: {error}") from error
        held = self._strategy.holds
        checkpoint.restore(
            saved, self._curvature.statistics, self._curvature.caches, self._schedule, held, self._device
        )
        self.stats = StepStats(step=saved["step"], failed_inversions=saved["failed_inversions"])
        self._arm(self.stats.step + 1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, but at construction alone. Raises: ConfigError, with the value and the bound of a bad setting."""
        if self._is_built:
            raise ConfigError(
                "NGD settles at construction what it updates; build a new one after unfreezing parameters"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        bounds = {
            "lr": (group["lr"] >= 0, ">= 0"),
            "momentum": (0 <= group["momentum"] < 1, ">= 0 and < 1"),
            "weight_decay": (group["weight_decay"] >= 0, ">= 0"),
            "damping": (group["damping"] > 0, "> 0"),
        }
        for name, (is_valid, bound) in bounds.items():
            if not is_valid:
                raise ConfigError(
                    f"{name} must be {bound}, got {group[name]} in param group {len(self.param_groups) - 1}"
                )

    def _collect(self, due: list[Key]) -> Collected:
        """Returns the global means: due statistics and gradients of the layers held here, and plain gradients."""
        captured, wrong = self._capture.take(), self._capture.miscounted()
        values: dict[Key, Tensor] = {}
        for key in due:
            spec = self._curvature.statistics[key].spec
            dtype = self._layer[key.layer].dtype
            missing = torch.zeros(spec.numbers, dtype=dtype, device=self._device)
            values[key] = spec.flatten(captured[key]) if key in captured else missing
        count = dict.fromkeys((key.layer for key in captured), 1.0) | dict.fromkeys(wrong, float("nan"))
        counts = {key.layer: torch.full((1,), count.get(key.layer, 0.0), device=self._device) for key in due}
        gradients = {layer.name: layer.join([_gradient(p) for p in layer.parameters]) for layer in self.layers}
        return self._strategy.collect(Local(values, counts, gradients, [_gradient(p) for p in self._plain]))

    def _check_counts(self, reports: Mapping[Key, Report]) -> None:
        """Raises CaptureError on every rank, since every rank has the same reports; arms again for who goes on."""
        wrong = sorted({key.layer for key, report in reports.items() if report.verdict is Verdict.MISCOUNTED})
        if not wrong:
            return
        here = self._capture.miscounted().get(wrong[0])
        times = f"{here} times" if here else "too often, or too rarely, on another rank"
        self._arm(self.stats.step + 1)
        raise CaptureError(
            f"layer {wrong[0]!r} was differentiated {times} in one optimizer step, but micro_batches is "
            f"{self.config.micro_batches}; set micro_batches to the number of backward passes per step. A module that "
            "runs several times in one forward pass is not supported: give each run its own module"
        )

    def _by_parameter(self, directions: Mapping[str, Tensor], plain: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        steps = dict(zip(self._plain, plain, strict=True))
        for layer in self.layers:
            steps |= zip(layer.parameters, layer.split(directions[layer.name]), strict=True)
        return {p: step.to(p.dtype) for p, step in steps.items()}

    def _finish(self, due: list[Key], reports: Mapping[Key, Report]) -> None:
        """Plans the next refreshes from the reports, the same on every rank, and writes the step's statistics."""
        step = self.stats.step + 1
        self._report_unseen(key.layer for key in due if reports[key].verdict is Verdict.UNSEEN)
        self._schedule.advance(step, {key: reports[key].verdict for key in due})
        tracks = self._schedule.tracks.values()
        failures = sum(report.ending is not Ending.OK for report in reports.values())
        self.stats = StepStats(
            step=step,
            seconds=self._stopwatch.take(),
            bytes_sent=self._comm.take_sent(),
            ages=[step - track.refreshed for track in tracks],
            intervals=[track.interval for track in tracks],
            refreshes=[Refresh(str(key), reports[key].change, reports[key].ending.name) for key in due],
            failed_inversions=self.stats.failed_inversions + failures,
        )
        self._arm(step + 1)

    def _report_unseen(self, layers: Iterable[str]) -> None:
        """Tells once of each layer that has gradients but never ran: something uses its weights past its module."""
        for name in set(layers):
            parameters = self._layer[name].parameters
            if (
                self._curvature.caches[name] is None
                and name not in self._unseen
                and any(p.grad is not None for p in parameters)
            ):
                self._unseen.add(name)
                logger.warning("layer %r takes a plain gradient step: its weights are used without its module", name)

    def _arm(self, step: int) -> None:
        self._capture.arm(self._schedule.due(step))

    def _damping(self, name: str) -> float:
        weight = self._layer[name].parameters[0]
        return next(float(group["damping"]) for group in self.param_groups if any(p is weight for p in group["params"]))

    def _build_strategy(self, costs: Mapping[str, int], *, is_averaged_by_ddp: bool) -> Strategy:
        sums = self.config.loss_reduction == "sum"
        if sums and is_averaged_by_ddp:
            raise ConfigError("loss_reduction 'sum' needs the bare model: DDP divides the sum by the number of ranks")
        choice = self.config.strategy or (Single() if self._comm.world_size == 1 else OwnerSharded())
        if isinstance(choice, Single) and self._comm.world_size > 1:
            raise ConfigError(
                f"strategy 'single' needs one process, got a group of {self._comm.world_size}; "
                "choose all_reduce or owner_sharded, or leave strategy out"
            )
        dtypes = [layer.dtype for layer in self.layers] + [p.dtype for p in self._plain] + [torch.float32]
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        wire = torch.bfloat16 if self.config.statistics_wire == "bfloat16" else torch.float32
        return STRATEGIES[choice.kind](
            self._comm,
            longest_first(costs, self._comm.world_size),
            {layer.name: (layer.shape.outputs, layer.shape.inputs) for layer in self.layers},
            dtype=dtype,
            wire_dtype=torch.float64 if dtype == torch.float64 else wire,
            device=self._device,
            gradient_scale=None if is_averaged_by_ddp else 1.0 if sums else 1 / self._comm.world_size,
        )

    def _report_plain(self, of_model: set[nn.Parameter]) -> None:
        strangers = sum(p not in of_model for p in self._plain)
        if strangers and self._strategy.gradient_scale is None:
            raise ConfigError(
                f"DDP averages its model's gradients alone: {strangers} in param_groups are not of the model"
            )
        if strangers:
            self.plain_parameters[f"{strangers} in param_groups"] = "not a parameter of the model"
        if self.plain_parameters:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in self.plain_parameters.items())
            logger.warning("plain gradient step for %d parameters: %s", len(self.plain_parameters), reasons)


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.DataParallel):
        raise ConfigError("NGD can't see into nn.DataParallel's copies; use DistributedDataParallel or the bare model")
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(bare, nn.Module)
    return bare


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

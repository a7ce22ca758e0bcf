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
from ngd_dist.errors import CheckpointError, ConfigError
from ngd_dist.inversion import Ending
from ngd_dist.placement import longest_first
from ngd_dist.preconditioners import Cache, preconditioner_for
from ngd_dist.staleness import Schedule, Verdict, judge
from ngd_dist.statistics import Key, Statistic
from ngd_dist.strategies import STRATEGIES, Report, Strategy
from ngd_dist.telemetry import Refresh, StepStats, Stopwatch

__all__ = ["NGD"]

logger = logging.getLogger(__name__)


class NGD(torch.optim.Optimizer):
    """SP-NGD as a torch optimizer: preconditions covered layers, takes a plain gradient step elsewhere.

    model: every rank has the same weights. Bare, or wrapped in DistributedDataParallel; for a bare model the strategy
        averages the gradients over ranks, for a wrapped one DDP has.
    config: the mathematics; see `NGDConfig`.
    param_groups: as for any torch optimizer, with lr, momentum, weight_decay and damping; default: one group with all
        trainable parameters. A layer's damping is that of its weight's group.
    process_group: the ranks that share a batch; default: the whole world.

    Collective: every rank calls the constructor, `step`, `state_dict` and `load_state_dict`, in the same order.
    Raises: ConfigError for settings that contradict the model or the group.
    """

    def __init__(
        self,
        model: nn.Module,
        config: NGDConfig | None = None,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config = config or NGDConfig()
        wrapped = isinstance(model, DistributedDataParallel)
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        assert isinstance(bare, nn.Module)
        self.layers, self.plain_parameters = cover(bare)
        trainable = [p for p in bare.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError("the model has no trainable parameter; NGD needs at least one")
        defaults = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay", "damping")}
        super().__init__(trainable if param_groups is None else param_groups, defaults)
        self._layer = {layer.name: layer for layer in self.layers}
        self._shapes = {layer.name: (layer.shape.outputs, layer.shape.inputs) for layer in self.layers}
        covered = {id(p) for layer in self.layers for p in layer.parameters}
        self._plain = [p for p in trainable if id(p) not in covered]
        self._report_plain()

        self.stats = StepStats()
        self._stopwatch = Stopwatch()
        self._comm = Communicator(process_group)
        self._device = trainable[0].device
        self._preconditioners = {
            layer.name: preconditioner_for(layer.shape, config.preconditioner) for layer in self.layers
        }
        costs = {name: preconditioner.cost().refresh_flops for name, preconditioner in self._preconditioners.items()}
        self._strategy = self._build_strategy(costs, averages_gradients=not wrapped)
        keys = [Key(name, spec.name) for name, p in self._preconditioners.items() for spec in p.statistics]
        self._schedule = Schedule(costs, keys, config.staleness, config.stagger)
        self._statistics, self._caches = self._empty_state(keys)
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

        A parameter without a gradient counts as having a zero one. Raises: CaptureError, CollectiveError.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due, phase = self._schedule.due(self.stats.step + 1), self._stopwatch.phase
        with phase("reduce"):
            means, gradients, plain = self._collect(due)
        with phase("refresh"):
            reports = self._refresh(due, means)
        with phase("apply"):
            directions = {name: self._apply(name, gradient) for name, gradient in gradients.items()}
        with phase("publish"):
            directions, reports = self._strategy.publish(directions, self._shapes, reports, due)
        with phase("update"):
            update.apply_(self.param_groups, self._by_parameter(directions, plain), self.state)
        self._finish(due, reports)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Collective. Returns the whole state on every rank: torch's, and under "ngd" the layers' by name."""
        mine = [key for key in self._schedule.tracks if self._strategy.reports(key.layer)]
        return super().state_dict() | {
            "ngd": checkpoint.gather(
                self._comm,
                {key: self._statistics[key] for key in mine},
                {key.layer: self._caches[key.layer] for key in mine},
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
        checkpoint.restore(saved, self._statistics, self._caches, self._schedule, self._device)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "ngd"})
        self.stats = StepStats(step=saved["step"], failed_inversions=saved["failed_inversions"])
        self._arm(self.stats.step + 1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; checks the settings. Raises: ConfigError naming the value and the bound."""
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

    def _collect(self, due: list[Key]) -> tuple[dict[Key, Tensor], dict[str, Tensor], list[Tensor]]:
        """Returns the global means: due statistics and gradients of the layers held here, and plain gradients."""
        captured = self._capture.take()
        values: dict[Key, Tensor] = {}
        for key in due:
            spec = self._statistics[key].spec
            dtype = self._layer[key.layer].dtype
            missing = torch.zeros(spec.numbers, dtype=dtype, device=self._device)
            values[key] = spec.flatten(captured[key]) if key in captured else missing
        seen = {key.layer for key in captured}
        counts = {key.layer: torch.full((1,), float(key.layer in seen), device=self._device) for key in due}
        gradients = {layer.name: layer.join([_gradient(p) for p in layer.parameters]) for layer in self.layers}
        collected = self._strategy.collect(values, counts, gradients, [_gradient(p) for p in self._plain])
        return collected.statistics, collected.gradients, collected.plain

    def _refresh(self, due: list[Key], means: Mapping[Key, Tensor]) -> dict[Key, Report]:
        """Returns a report on each due statistic of the layers held here, after folding it in and inverting."""
        reports: dict[Key, Report] = {}
        for name in dict.fromkeys(key.layer for key in due if self._strategy.holds(key.layer)):
            found = {key: self._fold(key, means) for key in due if key.layer == name}
            endings = self._invert(name) if any(r.verdict is not Verdict.UNSEEN for r in found.values()) else {}
            waiting = endings.keys() - {key.statistic for key in found}
            for key, report in found.items():
                ending = max([report.ending, *(endings.get(s, Ending.OK) for s in {key.statistic} | waiting)])
                verdict = report.verdict if ending is Ending.OK else Verdict.CHANGED
                reports[key] = Report(verdict, ending, report.change)
        return reports

    def _fold(self, key: Key, means: Mapping[Key, Tensor]) -> Report:
        if key not in means:
            return Report(Verdict.UNSEEN, Ending.OK, float("inf"))
        mean = means[key].to(self._layer[key.layer].dtype)
        if not bool(torch.isfinite(mean).all()):  # one host read per refresh; a bad value must not enter the average
            return Report(Verdict.CHANGED, Ending.NON_FINITE, float("inf"))
        statistic = self._statistics[key]
        change = statistic.fold(statistic.spec.expand(mean))
        staleness = self.config.staleness
        threshold = getattr(staleness.thresholds, key.statistic) if staleness.kind == "adaptive" else float("inf")
        return Report(judge(change, threshold), Ending.OK, change.to_last)

    def _invert(self, name: str) -> Mapping[str, Ending]:
        """Rebuilds one layer's cache; does nothing until each of its statistics has a value."""
        preconditioner = self._preconditioners[name]
        values = {spec.name: self._statistics[Key(name, spec.name)].value for spec in preconditioner.statistics}
        ready = {key: value for key, value in values.items() if value is not None}
        if len(ready) < len(values):
            return {}
        refreshed = preconditioner.refresh(ready, self._damping(name), self._caches[name])
        self._caches[name] = refreshed.cache
        return refreshed.endings

    def _apply(self, name: str, grad_OI: Tensor) -> Tensor:
        cache = self._caches[name]
        return grad_OI if cache is None else self._preconditioners[name].apply(cache, grad_OI)

    def _by_parameter(self, directions: Mapping[str, Tensor], plain: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        steps = dict(zip(self._plain, plain, strict=True))
        for layer in self.layers:
            steps |= zip(layer.parameters, layer.split(directions[layer.name]), strict=True)
        return {p: step.to(p.dtype) for p, step in steps.items()}

    def _finish(self, due: list[Key], reports: Mapping[Key, Report]) -> None:
        """Plans the next refreshes from the reports, the same on every rank, and writes the step's statistics."""
        step = self.stats.step + 1
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

    def _arm(self, step: int) -> None:
        self._capture.arm(self._schedule.due(step))

    def _damping(self, name: str) -> float:
        weight = self._layer[name].parameters[0]
        return next(float(group["damping"]) for group in self.param_groups if any(p is weight for p in group["params"]))

    def _build_strategy(self, costs: Mapping[str, int], *, averages_gradients: bool) -> Strategy:
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
            dtype=dtype,
            wire_dtype=torch.float64 if dtype == torch.float64 else wire,
            device=self._device,
            averages_gradients=averages_gradients,
        )

    def _empty_state(self, keys: list[Key]) -> tuple[dict[Key, Statistic], dict[str, Cache | None]]:
        specs = {Key(name, s.name): s for name, p in self._preconditioners.items() for s in p.statistics}
        statistics = {
            key: Statistic(specs[key], ema_decay=self.config.ema_decay, remembers=self._strategy.reports(key.layer))
            for key in keys
        }
        return statistics, {layer.name: None for layer in self.layers}

    def _report_plain(self) -> None:
        if self.plain_parameters:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in self.plain_parameters.items())
            logger.warning("plain gradient step for %d parameters: %s", len(self.plain_parameters), reasons)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

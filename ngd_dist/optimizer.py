"""START HERE. `NGD.step()` is one step of distributed natural gradient descent in a few lines."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ngd_dist import failures, update
from ngd_dist.adaptation import Adaptation, Objective
from ngd_dist.capture import Capture
from ngd_dist.checkpoint import SavedState
from ngd_dist.comm import Communicator
from ngd_dist.config import AdamWFallback, LayerWise, NGDConfig
from ngd_dist.coverage import cover, is_averaged_by_ddp, unwrap
from ngd_dist.curvature import Curvature, cargo_of, schedule_for
from ngd_dist.damping import damping_after
from ngd_dist.errors import CaptureError, ConfigError
from ngd_dist.explanation import explain
from ngd_dist.fallback import Fallback
from ngd_dist.gradients import Gradients
from ngd_dist.loss_scale import LossScale
from ngd_dist.output_fisher import OutputFisher
from ngd_dist.param_groups import check_group
from ngd_dist.preconditioners import preconditioner_for
from ngd_dist.staleness import Verdict
from ngd_dist.statistics import Key
from ngd_dist.step_length import StepLength
from ngd_dist.strategies import Collected, Findings, Local, Report, Strategy, build_strategy
from ngd_dist.telemetry import Adapted, StepStats, Stopwatch

__all__ = ["NGD"]

logger = logging.getLogger(__name__)


class NGD(torch.optim.Optimizer):
    """Natural gradient descent as a torch optimizer: preconditions covered layers, leaves the rest to a fallback.

    model: every rank has the same weights, and the first dimension of its inputs counts samples. Bare, compiled, or
        wrapped in DistributedDataParallel; for a bare model the strategy averages the gradients over ranks, for a
        wrapped one DDP has.
    config: the mathematics; see `NGDConfig`.
    param_groups: as for any torch optimizer, with lr, momentum, weight_decay and damping; default: one group with all
        trainable parameters. Parameters in no group are left alone. A layer's damping is that of its weight's group.
    process_group: the ranks that share a batch; default: the whole world.
    grad_scaler: the GradScaler that scales the loss, where one does.

    Collective: every rank calls the constructor, `step`, `state_dict` and `load_state_dict`, in the same order.
    Raises: ConfigError for settings that contradict the model or the group.
    """

    _step_supports_amp_scaling = True  # a GradScaler then leaves it to `step` to skip a step that overflowed

    def __init__(
        self,
        model: nn.Module,
        config: NGDConfig | None = None,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        process_group: dist.ProcessGroup | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.config = config = NGDConfig.model_validate(config or {})
        bare = unwrap(model)
        trainable = [p for p in bare.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError("the model has no trainable parameter; NGD needs at least one")
        self._is_built = False
        defaults = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay", "damping")}
        super().__init__(trainable if param_groups is None else param_groups, defaults)
        self._is_built = True
        updated = [p for group in self.param_groups for p in group["params"]]
        self.layers, self.plain_parameters = cover(bare, set(updated), config)
        self._layer = {layer.name: layer for layer in self.layers}
        self._names = dict(bare.named_parameters())
        of_model = {p: name for name, p in self._names.items()}
        self._updated = {p: of_model.get(p, f"param_groups parameter {i}") for i, p in enumerate(updated)}
        covered = {p for layer in self.layers for p in layer.parameters}
        self._plain = [p for p in updated if p not in covered]
        group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        self._group_of = {name: group_of[layer.parameters[0]] for name, layer in self._layer.items()}

        self.stats = StepStats()
        self._unseen: set[str] = set()
        self._stopwatch = Stopwatch()
        self._comm = Communicator(process_group)
        self._device = trainable[0].device
        self._preconditioners = {layer.name: preconditioner_for(layer.shape, config) for layer in self.layers}
        self._costs = {name: preconditioner.refresh_flops() for name, preconditioner in self._preconditioners.items()}
        self._strategy = self._build_strategy(is_averaged_by_ddp=is_averaged_by_ddp(model))
        self._report_plain()
        self._fallback = self._build_fallback()
        self._schedule = schedule_for(self._preconditioners, config)
        self._curvature = Curvature(self.layers, self._preconditioners, self._strategy, config, self._damping)
        self._loss_scale = LossScale(grad_scaler)
        self._gradients = Gradients({name: p for p, name in self._updated.items()}, self._loss_scale, self._comm)
        self._capture = Capture(
            bare,
            self.layers,
            self._preconditioners,
            config,
            comm=self._comm,
            keeps_rows=isinstance(config.length, LayerWise),
            shared_of=self._curvature.shared_of,
            loss_scale=self._loss_scale.factor,
            on_ready=self._strategy.offer,
            stopwatch=self._stopwatch,
        )
        self._length = StepLength(config, list(self._layer), self._comm, self._lr, self._capture.rows)
        self._output_fisher = OutputFisher(config, self._capture, self._comm.rank)
        self._adaptation = Adaptation(config, bare, self._comm, self._capture.paused)
        self.saved_state = self._build_saved_state()
        self._arm(1)

    @property
    def statistic_names(self) -> list[str]:
        """Returns "layer.statistic" for every statistic, in the order of `stats.ages` and `stats.intervals`."""
        return [str(key) for key in self._schedule.tracks]

    def fisher_backward(self, output: Tensor) -> None:
        """Gives the statistics the gradients of the model's own predictions, unless `config.fisher` is empirical.

        Call it once per forward pass, between it and `loss.backward()`, with what the model returned. It runs the
        backward passes that this step needs, often none, and touches no parameter's gradient.
        Raises: ConfigError for an output with too many dimensions for the exact Fisher; CaptureError.
        """
        self._output_fisher.backward(output, self.stats.step + 1)

    @overload
    def step(self, closure: None = None, *, objective: Objective | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, objective: Objective | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, objective: Objective | None = None) -> float | None:
        """Collective. Updates the parameters from their gradients; returns the closure's loss, if one is given.

        objective: returns (loss, output) of the batch, or a part of it, without differentiating: for the settings that
            adapt to the loss, which evaluate it again (`config.needs_objective`).

        A parameter without a gradient counts as having a zero one. Raises, on every rank: CaptureError if a layer was
        not differentiated once per micro-batch; NonFiniteError; InversionError; CollectiveError.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_call(objective)
        due, phase = self._schedule.due(self.stats.step + 1), self._stopwatch.phase
        with torch.autocast(self._device.type, enabled=False):
            with phase("reduce"):
                means = self._collect(due)
            if not means.is_finite:
                self._skip()
                return loss
            with phase("refresh"):
                reports = self._curvature.refresh(due, means, self._capture.estimates.seconds)
            with phase("apply"):
                directions = {name: self._curvature.apply(name, gradient) for name, gradient in means.gradients.items()}
            with phase("publish"):
                findings = self._strategy.publish(self._findings(directions, means, reports), due)
            self._curvature.settle(findings.reports)
            self._check(findings.reports)
            with phase("update"):
                adapted = self._update(findings, means.plain, objective)
        self._finish(due, findings, adapted)
        return loss

    def explain(self) -> str:
        """Returns a table of what each layer gets, and why the other parameters are left to the fallback."""
        return explain(
            self.config,
            self.layers,
            self._preconditioners,
            self._strategy,
            self.plain_parameters,
            self._capture.activations,
        )

    def state_dict(self) -> dict[str, Any]:
        """Collective. Returns the whole state on every rank: torch's, and under "ngd" the layers' by name."""
        return super().state_dict() | {"ngd": self.saved_state.gather(self._comm, self.stats)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state saved at any world size. Raises: CheckpointError, with nothing changed, if it is unfit."""
        self.saved_state.check(state_dict, self.param_groups)
        self.stats = self.saved_state.restore(state_dict["ngd"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "ngd"})
        self._arm(self.stats.step + 1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, but at construction alone. Raises: ConfigError, with the value and the bound of a bad setting."""
        if self._is_built:
            raise ConfigError(
                "NGD settles at construction what it updates; build a new one after unfreezing parameters"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group, len(self.param_groups) - 1, self.config)
        # What schedules of damping and of momentum start from; kept by `state_dict` with the group.
        group.setdefault("first_lr", group["lr"])
        group.setdefault("first_damping", group["damping"])

    def _check_call(self, objective: Objective | None) -> None:
        if self.config.needs_objective and objective is None:
            raise ConfigError(
                "step_length quadratic_model and damping_rule levenberg_marquardt evaluate the loss again: call "
                "step(objective=...) with a function that returns (loss, output)"
            )
        if objective is not None and not self.config.needs_objective:
            raise ConfigError("no setting of this config evaluates the loss again: leave out objective")
        if self._capture.needs_fisher_pass and not self._capture.fisher_passes:
            raise CaptureError(
                f"fisher {self.config.fisher.kind!r} needs gradients of the model's predictions: call "
                "optimizer.fisher_backward(output) after each forward pass, before loss.backward()"
            )

    def _collect(self, due: list[Key]) -> Collected:
        """Returns the global means: due statistics and gradients of the layers held here, and plain gradients."""
        captured, wrong = self._capture.take(), self._capture.miscounted()
        for key, value in captured.items():
            self._strategy.offer(key, value)
        tallies = self._capture.estimates.tallies(due, wrong, self._device)
        gradients = {
            layer.name: layer.join([self._gradients.of(self, p) for p in layer.parameters]) for layer in self.layers
        }
        plain = [self._gradients.of(self, p) for p in self._plain]
        non_finite = self._gradients.non_finite(self, self._device)
        return self._strategy.collect(Local(non_finite, tallies, gradients, plain))

    def _skip(self) -> None:
        """Gives the step up: weights, statistics and schedule stay. Raises: NonFiniteError on all ranks, if set so."""
        is_scaled = hasattr(self, "found_inf")
        self._loss_scale.report_overflow(self)
        self._arm(self.stats.step + 1)
        self.stats = replace(
            self.stats,
            skipped_steps=self.stats.skipped_steps + 1,
            seconds=self._stopwatch.take(),
            bytes_sent=self._comm.take_sent(),
            refreshes=[],
            adapted=Adapted(),
        )
        if is_scaled or self.config.non_finite == "skip":
            return
        raise self._gradients.error(self.stats.step + 1)

    def _findings(self, directions: dict[str, Tensor], means: Collected, reports: dict[Key, Report]) -> Findings:
        like = torch.zeros((), dtype=self._strategy.dtype, device=self._device)
        inner = self._length.inner(directions, means.gradients, like)
        return Findings(directions, reports, inner)

    def _check(self, reports: Mapping[Key, Report]) -> None:
        """Raises on every rank or on none, since every rank has the same reports; arms again for who goes on."""
        wrong = sorted({key.layer for key, report in reports.items() if report.verdict is Verdict.MISCOUNTED})
        bound, before = self.config.max_failed_inversions, self.stats.failed_inversions
        error = self._capture.miscount(wrong[0]) if wrong else failures.error_beyond(bound, before, reports)
        if error is not None:
            self._arm(self.stats.step + 1)
            raise error

    def _update(self, findings: Findings, plain: list[Tensor], objective: Objective | None) -> Adapted:
        """Moves the weights, unless this step belongs to the burn-in."""
        for group in self.param_groups:
            group["damping"] = damping_after(self.config.damping_rule, group, self.stats.step + 1)
        if self.stats.step < self.config.burn_in:
            return Adapted()
        directions = self._length.scale(findings.directions, findings.inner)
        steps: dict[nn.Parameter, Tensor] = {}
        for layer in self.layers:
            steps |= zip(layer.parameters, layer.split(directions[layer.name]), strict=True)
        gradients = dict(zip(self._plain, plain, strict=True))
        if self._fallback is None:
            steps |= gradients
        else:
            self._fallback.step(self.param_groups, gradients)
        steps = {p: step.to(p.dtype) for p, step in steps.items()}
        return self._adaptation.move(self.stats.step + 1, self.param_groups, steps, self.state, objective, self._apply)

    def _apply(self, steps: Mapping[nn.Parameter, Tensor]) -> None:
        shapes = {layer.parameters[0]: layer.shape for layer in self.layers}
        matrices = {p: s for p, s in shapes.items() if s.fisher == "kronecker" and not s.has_one_hot_inputs}
        update.apply_(
            self.param_groups,
            steps,
            self.state,
            momentum_mode=self._adaptation.momentum_mode,
            rescaled={p: shape.blocks * shape.outputs for p, shape in matrices.items()},
            rescaling=self.config.weight_rescaling,
        )

    def _finish(self, due: list[Key], findings: Findings, adapted: Adapted) -> None:
        """Plans the next refreshes from the reports, the same on every rank, and writes the step's statistics."""
        step, reports = self.stats.step + 1, findings.reports
        unseen = (key.layer for key in due if reports[key].verdict is Verdict.UNSEEN)
        self._report_unseen(name for name in unseen if self._strategy.reports(name))
        verdicts, rows = ({key: getattr(reports[key], name) for key in due} for name in ("verdict", "rows"))
        before = dict(self._schedule.tracks)
        self._schedule.advance(step, verdicts, rows)
        tracks = self._schedule.tracks.values()
        self.stats = StepStats(
            step=step,
            seconds=self._stopwatch.take(),
            bytes_sent=self._comm.take_sent(),
            ages=[step - track.refreshed for track in tracks],
            intervals=[track.interval for track in tracks],
            refreshes=self._curvature.told({key: reports[key] for key in due}, before, self._schedule.tracks, step),
            failed_inversions=failures.count(self.stats.failed_inversions, reports),
            skipped_steps=self.stats.skipped_steps,
            lr=float(self.param_groups[0]["lr"]),
            momentum=float(self.param_groups[0]["momentum"]),
            damping=float(self.param_groups[0]["damping"]),
            adapted=adapted,
        )
        self._arm(step + 1)

    def _report_unseen(self, layers: Iterable[str]) -> None:
        """Tells once of each layer that has gradients but never ran: something uses its weights past its module."""
        for name in set(layers):
            parameters = self._layer[name].parameters
            if (
                not self._curvature.caches.has(name)
                and name not in self._unseen
                and any(p.grad is not None for p in parameters)
            ):
                self._unseen.add(name)
                logger.warning("layer %r takes a plain gradient step: its weights are used without its module", name)

    def _arm(self, step: int) -> None:
        due = self._schedule.due(step)
        self._loss_scale.begin()
        self._capture.arm(due, step)
        self._strategy.begin(due)

    def _lr(self, name: str) -> float:
        return float(self.param_groups[self._group_of[name]]["lr"])

    def _damping(self, name: str) -> float:
        return float(self.param_groups[self._group_of[name]]["damping"])

    def _build_fallback(self) -> Fallback | None:
        choice = self.config.fallback
        if not isinstance(choice, AdamWFallback):
            return None
        return Fallback(self.param_groups, {p: self._updated[p] for p in self._plain}, choice)

    def _build_saved_state(self) -> SavedState:
        return SavedState(
            self.layers,
            self._preconditioners,
            self._curvature,
            self._schedule,
            self._strategy,
            parameters={name: p for p, name in self._updated.items()},
            plain=[self._updated[p] for p in self._plain],
            fallback=self._fallback,
            momentum_mode=self._adaptation.momentum_mode,
            device=self._device,
        )

    def _build_strategy(self, *, is_averaged_by_ddp: bool) -> Strategy:
        dtypes = [layer.dtype for layer in self.layers] + [p.dtype for p in self._plain]
        return build_strategy(
            self.config,
            self._comm,
            self._costs,
            {layer.name: cargo_of(layer, self._preconditioners[layer.name]) for layer in self.layers},
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
            device=self._device,
            is_averaged_by_ddp=is_averaged_by_ddp,
        )

    def _report_plain(self) -> None:
        of_model = set(self._names.values())
        strangers = sum(p not in of_model for p in self._plain)
        if strangers and self._strategy.gradient_scale is None:
            raise ConfigError(
                f"DDP averages its model's gradients alone: {strangers} in param_groups are not of the model"
            )
        if strangers:
            self.plain_parameters[f"{strangers} in param_groups"] = "not a parameter of the model"
        if self.plain_parameters:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in self.plain_parameters.items())
            kind = self.config.fallback.kind
            logger.warning("fallback %s for %d parameters: %s", kind, len(self.plain_parameters), reasons)

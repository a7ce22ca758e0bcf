"""Selects the parameters that are updated, and builds the components of the optimizer that follow from them.

If parameters come later (`add_param_group`, or unfrozen ones), the components are built again, and the state of each
layer is kept.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ngd_dist.capture.capture import Capture
from ngd_dist.capture.coverage import check_owned, check_sparse, cover
from ngd_dist.capture.loss_scale import LossScale
from ngd_dist.capture.output_fisher import OutputFisher
from ngd_dist.checkpoint import SavedState, from_bytes, to_bytes
from ngd_dist.config import AdamWFallback, NGDConfig
from ngd_dist.covered import CoveredLayer
from ngd_dist.curvature import Curvature, schedule_for
from ngd_dist.distributed import LayerParts, Sync, build_sync
from ngd_dist.distributed.comm import Communicator
from ngd_dist.engines import unwrap
from ngd_dist.errors import ConfigError
from ngd_dist.layers import Layer
from ngd_dist.layers.hooks import weakly
from ngd_dist.preconditioners import preconditioner_for
from ngd_dist.statistics.staleness import Schedule
from ngd_dist.statistics.statistic import Key
from ngd_dist.step.fallback import Fallback
from ngd_dist.step.gradients import Gradients
from ngd_dist.step.layer_watch import LayerWatch
from ngd_dist.step.param_groups import Uncopied, check_group, take_in
from ngd_dist.step.spectra import Spectra
from ngd_dist.step.update import Update
from ngd_dist.telemetry import StepStats, Stopwatch

__all__ = ["Assembly"]

logger = logging.getLogger(__name__)


class Assembly(torch.optim.Optimizer):
    """An optimizer without its step. Its arguments are those of `NGD`.

    updates_weights: whether its step moves the weights, and does not leave that to another optimizer.
    """

    updates_weights = True
    layers: list[Layer]
    plain_parameters: dict[str, str]
    saved_state: SavedState
    _sync: Sync
    _fallback: Fallback | None
    _schedule: Schedule
    _curvature: Curvature
    _capture: Capture
    _due: list[Key]

    def __init__(
        self,
        model: nn.Module,
        config: NGDConfig | None = None,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        process_group: dist.ProcessGroup | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._model = model
        self._engine, self._bare = unwrap(model)
        self.config = config = self._engine.fitted(NGDConfig.model_validate(config or {}))
        trainable = [p for p in self._bare.parameters() if p.requires_grad]
        if not trainable:
            raise ConfigError("the model has no trainable parameter; NGD needs at least one")
        self._takes_all = param_groups is None
        self._comm = Communicator(process_group)
        self._engine.check_ranks(self._bare, self._comm.rank, self._comm.world_size)
        if (
            grad_scaler is not None
            and grad_scaler.is_enabled()
            and (self._engine.is_sharded or self._engine.steps_itself)
        ):
            raise ConfigError(
                f"grad_scaler must be None under {self._engine.averager}: take bfloat16, or its own scale"
            )
        self._group, self._scaler = process_group, grad_scaler
        self._device = trainable[0].device
        self._loss_scale = LossScale(grad_scaler, self._engine, is_divided_out=not self.updates_weights)
        self._stopwatch = Stopwatch()
        self._unseen: set[str] = set()
        self.stats = StepStats()
        self._groups_seen: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self._trained: set[nn.Parameter] = set()
        self._waiting: list[nn.Parameter] = []
        self._is_built = self._is_watched = False
        defaults = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay", "damping")}
        super().__init__(trainable if param_groups is None else param_groups, defaults)
        self._assemble()
        self._engine.attach(self._stepped, is_update=self.updates_weights)

    def _stepped(self) -> None:
        """Takes the step for an engine, by the method that a scheduler of torch's may have wrapped by then."""
        self.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises: ConfigError, with the value and the bound of a bad setting.

        >>> from ngd_dist import NGD
        >>> body, head = nn.Linear(8, 16), nn.Linear(16, 4)
        >>> optimizer = NGD(nn.Sequential(body, head), param_groups=[{"params": body.parameters()}])
        >>> optimizer.add_param_group({"params": head.parameters(), "lr": 0.01})
        """
        if self._is_built and self._capture.is_under_way:
            raise ConfigError("add_param_group comes between steps: call it after step(), or zero_grad() before it")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, len(self.param_groups) - 1, self.config)
            # Schedules of damping and of momentum start from these; `state_dict` keeps them with the group.
            group.setdefault("first_lr", group["lr"])
            group.setdefault("first_damping", group["damping"])
            if self._is_built:
                self._assemble()
        except ConfigError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Returns the arguments and the state of a copy: the model is copied, captures of this step are not."""
        if self._engine.is_sharded or self._engine.steps_itself:
            raise ConfigError(
                f"a model of {self._engine.averager} can't be copied with its optimizer: save state_dict()"
            )
        return {
            "model": self._model,
            "config": self.config,
            "param_groups": self.param_groups,
            "takes_all": self._takes_all,
            "process_group": Uncopied(self._group),
            "grad_scaler": self._scaler,
            "state": dict(self.state),
            # As bytes: torch sends tensors to a process as files, and the files of tensors made here would be gone.
            "ngd": to_bytes(self.saved_state.local(self.stats)),
            "own": to_bytes(self.saved_state.own()),
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        if "model" not in saved:  # torch's `load_state_dict` calls this for its part
            super().__setstate__(saved)
            return
        groups, group, scaler = saved["param_groups"], saved["process_group"].value, saved["grad_scaler"]
        Assembly.__init__(
            self, saved["model"], saved["config"], param_groups=groups, process_group=group, grad_scaler=scaler
        )
        self._takes_all = saved["takes_all"]
        self._waiting = self._untrained()
        self.state.update(saved["state"])
        self.stats = self.saved_state.restore(from_bytes(saved["ngd"]))
        self.saved_state.restore_own(from_bytes(saved["own"]))
        self._begin_step(self.stats.step + 1)

    def _assemble(self) -> None:
        """Builds the components that follow from the parameters that are updated, and keeps the state of each layer."""
        config, in_groups = self.config, [p for group in self.param_groups for p in group["params"]]
        name_in_model = {p: name for name, p in self._bare.named_parameters()}
        self._names = {p: name_in_model.get(p, f"param_groups parameter {i}") for i, p in enumerate(in_groups)}
        self._trained |= {p for p in in_groups if p.requires_grad}
        self._waiting = self._untrained()
        group_of = self._group_of_parameters()
        with self._engine.whole_shapes(self._bare):
            self.layers, self.plain_parameters = cover(self._bare, self._trained, config)
            self._covered = {
                layer.name: CoveredLayer(layer, preconditioner_for(layer.shape, config), group_of[layer.parameters[0]])
                for layer in self.layers
            }
            self._shapes = {self._names[p]: p.shape for p in in_groups} if self._engine.is_sharded else {}
        in_layers = {p for layer in self.layers for p in layer.parameters}
        self._plain = [p for p in in_groups if p in self._trained and p not in in_layers]
        check_sparse(self._bare, self._plain, config)
        self._report_plain()
        trained = {self._names[p]: p for p in in_groups if p in self._trained}
        self._gradients = Gradients(trained, self._loss_scale, self._comm, self._engine)
        self._sync = self._build_sync()
        self._build_state()
        self._capture = self._build_capture()
        self._output_fisher = OutputFisher(config, self._capture, self._engine, self._comm.rank)
        self._update = Update(
            self._covered,
            self._curvature.stacks,
            self._plain,
            self._gradients,
            self._fallback,
            self._bare,
            config,
            self._sync,
            self._capture,
        )
        self.saved_state = SavedState(
            self._covered,
            self._curvature,
            self._schedule,
            self._sync,
            parameters={name: p for p, name in self._names.items()},
            shapes=self._shapes,
            plain=[self._names[p] for p in self._plain],
            fallback=self._fallback,
            momentum_mode=self._update.momentum_mode,
            device=self._device,
        )
        self._watch_layers()
        self._is_built, self._groups_seen = True, []
        self._begin_step(self.stats.step + 1)

    def _watch_layers(self) -> None:
        """Builds the watch over these layers, if one is wanted."""
        self._watch = LayerWatch(self._covered, self._sync, list(self._schedule.tracks)) if self._is_watched else None
        specs = {key: statistic.spec for key, statistic in self._curvature.statistics.items()}
        self._curvature.spectra = Spectra(specs) if self._is_watched else None

    def _look_up_groups(self) -> None:
        """Gives each covered layer its param group of today: whoever replaces the groups need not tell.

        Raises: ConfigError for parameters that NGD was not built with.
        """
        today = [(group, [*group["params"]]) for group in self.param_groups]
        if _are_the_same(today, self._groups_seen):
            return
        check_owned(self.param_groups, self._names)
        self._groups_seen = today
        group_of = self._group_of_parameters()
        for covered in self._covered.values():
            covered.group = group_of.get(covered.layer.parameters[0], covered.group)

    def _group_of_parameters(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {p: group for group in self.param_groups for p in group["params"]}

    def _build_state(self) -> None:
        """Builds the state that a checkpoint has: statistics and caches, their schedule, the fallback's moments."""
        config, old = self.config, (self._curvature, self._schedule, self._fallback) if self._is_built else None
        names = {p: self._names[p] for p in self._plain}
        adamw = config.uncovered if isinstance(config.uncovered, AdamWFallback) else None
        pieces = {p: piece.weight for p, piece in self._gradients.pieces.items()} if self._engine.is_sharded else None
        self._fallback = None if adamw is None else Fallback(self.param_groups, names, adamw, pieces)
        self._schedule = schedule_for(self._covered, config)
        self._curvature = Curvature(self._covered, self._sync, config)
        if old is not None:
            curvature, schedule, fallback = old
            self._curvature.inherit(curvature)
            self._schedule.inherit(schedule)
            if self._fallback is not None and fallback is not None:
                self._fallback.inherit(fallback)

    def _build_capture(self) -> Capture:
        if self._is_built:
            self._capture.close()
        return Capture(
            self._bare,
            self._covered,
            self.config,
            self._comm,
            caches=self._curvature.caches,
            loss_scale=self._loss_scale,
            sink=self._sync,
            stopwatch=self._stopwatch,
            engine=self._engine,
            on_forward=weakly(self._on_forward),
        )

    def _on_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Returns whether parameters were unfrozen, so that a new capture with its own hooks has begun the pass."""
        if not self._take_in():
            return False
        self._capture.begin_forward(args, kwargs)
        return True

    def _take_in(self) -> bool:
        """Takes in parameters that are no longer frozen, unless a step is under way."""
        unfrozen = [p for p in self._waiting if p.requires_grad]
        if not unfrozen or self._capture.is_under_way:
            return False
        self._engine.check_unfrozen(len(unfrozen))
        if self._takes_all:
            take_in(self.param_groups[0], unfrozen, self._bare)
        self._assemble()
        return True

    def _untrained(self) -> list[nn.Parameter]:
        """Returns the parameters that are taken in once they are unfrozen."""
        of_model = self._bare.parameters() if self._takes_all else []
        in_groups = (p for group in self.param_groups for p in group["params"])
        return [p for p in dict.fromkeys((*of_model, *in_groups)) if p not in self._trained]

    def _frozen(self) -> dict[str, str]:
        """Returns the reason for each parameter of the model that has not been trained so far."""
        in_groups = {p for group in self.param_groups for p in group["params"]}
        return {
            name: "frozen; taken in when it is unfrozen" if self._takes_all or p in in_groups else "in no param group"
            for name, p in self._bare.named_parameters()
            if p not in self._trained
        }

    def _build_sync(self) -> Sync:
        dtypes = [layer.dtype for layer in self.layers] + [p.dtype for p in self._plain]
        parts, ranges = None, []
        if self._engine.is_sharded:
            parts = {
                layer.name: LayerParts(
                    [self._names[p] for p in layer.parameters], layer.shapes, layer.join, layer.split
                )
                for layer in self.layers
            }
            here = {self._names[p]: (x.start, x.weight.numel()) for p, x in self._gradients.pieces.items()}
            ranges = self._comm.all_gather_object("ranges of pieces", here)
        return build_sync(
            self.config,
            self._comm,
            {name: covered.method.refresh_flops() for name, covered in self._covered.items()},
            {name: covered.layout for name, covered in self._covered.items()},
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
            device=self._device,
            engine=self._engine,
            fixed=self._sync.placement.roles if self._is_built else {},
            parts=parts,
            ranges=ranges,
        )

    def _report_plain(self) -> None:
        of_model = set(self._bare.parameters())
        count = sum(p not in of_model for p in self._plain)
        if count:
            self._engine.check_foreign(count)
            self.plain_parameters[f"{count} in param_groups"] = "not a parameter of the model"
        if self.plain_parameters:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in self.plain_parameters.items())
            kind = f"fallback {self.config.uncovered.kind}" if self.updates_weights else "no direction"
            logger.warning("%s for %d parameters: %s", kind, len(self.plain_parameters), reasons)

    def _begin_step(self, step: int) -> None:
        self._due = due = self._schedule.due(step)
        self._gradients.forget()
        self._loss_scale.begin()
        self._capture.begin_step(due, step, self._curvature.with_rows)
        self._sync.begin(due)


def _are_the_same(
    groups: Sequence[tuple[dict[str, Any], Sequence[nn.Parameter]]],
    others: Sequence[tuple[dict[str, Any], Sequence[nn.Parameter]]],
) -> bool:
    """Returns whether these are the same objects: to compare tensors would compare their entries."""
    return len(groups) == len(others) and all(
        group is other and len(parameters) == len(of_other) and all(map(is_, parameters, of_other))
        for (group, parameters), (other, of_other) in zip(groups, others, strict=True)
    )

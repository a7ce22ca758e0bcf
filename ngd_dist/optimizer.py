"""START HERE. `NGD.step()` is one step of distributed natural gradient descent in a few lines."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from ngd_dist.assembly import Assembly
from ngd_dist.capture.coverage import check_held
from ngd_dist.curvature import failed_inversions, too_many_failed
from ngd_dist.distributed import GlobalMeans, LocalContribution, RefreshReport, StepResult
from ngd_dist.errors import CaptureError, ConfigError
from ngd_dist.explanation import explain
from ngd_dist.statistics.staleness import Verdict
from ngd_dist.statistics.statistic import Key
from ngd_dist.step.adaptation import Objective
from ngd_dist.telemetry import Adapted, StepStats

__all__ = ["NGD"]

logger = logging.getLogger(__name__)


class NGD(Assembly):
    """Natural gradient descent as a torch optimizer: preconditions covered layers, leaves the rest to a fallback.

    model: every rank has the same weights, and the first dimension of its inputs counts samples. Bare, compiled, or
        wrapped in DistributedDataParallel; if it is bare, NGD averages the
        gradients over ranks; if it is wrapped, DDP has averaged them.
    config: the mathematics; see `NGDConfig`.
    param_groups: as for any torch optimizer, with lr, momentum, weight_decay and damping. Parameters in no group are
        left alone. Default: one group with all parameters that are trainable, and those that are unfrozen later. The
        group of a layer's weight gives the layer's damping.
    process_group: the ranks that share a batch; default: the whole world.
    grad_scaler: the GradScaler that scales the loss, if there is one.

    Collective: every rank calls the constructor, `step`, `zero_grad`, `add_param_group`, `state_dict` and
    `load_state_dict`, in the same order. Copies (`copy.deepcopy`, `pickle`) bring a copy of the model along.
    Raises: ConfigError for settings that contradict the model or the group.

    >>> import torch
    >>> from torch import nn
    >>> from ngd_dist import NGD, NGDConfig
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.1))
    >>> for x, y in [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(3)]:
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    >>> optimizer.stats.step, optimizer.stats.ages
    (3, [0, 0, 0, 0])
    """

    _step_supports_amp_scaling = True  # so that a GradScaler lets `step` itself skip a step that overflowed

    @property
    def statistic_names(self) -> list[str]:
        """Returns "layer.statistic" for every statistic, in the order of `stats.ages` and `stats.intervals`."""
        return [str(key) for key in self._schedule.tracks]

    def fisher_backward(self, output: Any, *, ignored: Tensor | None = None) -> None:
        """Gives the statistics the gradients of the model's own predictions, unless `config.fisher` is empirical.

        output: the model's result: a tensor [N, ..., C], or several in a tuple, a dict or a ModelOutput. If keys name
            logits, the logits alone count. The likelihood of `config.fisher` reads all of them. With
            `statistics_fraction` it must be what the model returned, and no tensor made of that.
        ignored: bool, in the shape of the output without C; true where the loss reads no prediction (label -100). Given
            under the empirical Fisher too, it says that inputs may be padded where the output shows no padding.

        Call it once per forward pass, after the pass and before `loss.backward()`. It runs the backward passes that
        this step needs, often none, and touches no parameter's gradient.
        Raises: ConfigError for an output with too many dimensions for the exact Fisher; CaptureError.

        >>> from ngd_dist.config import MonteCarlo, NGDConfig
        >>> model = nn.Linear(8, 4)
        >>> optimizer = NGD(model, NGDConfig(fisher=MonteCarlo()))
        >>> output = model(torch.randn(32, 8))
        >>> optimizer.fisher_backward(output)
        >>> nn.functional.cross_entropy(output, torch.randint(4, (32,))).backward()
        >>> optimizer.step()
        """
        self._output_fisher.backward(output, self.stats.step + 1, ignored)

    def paused(self) -> AbstractContextManager[None]:
        """Returns a context in which no forward or backward pass counts for the statistics.

        It is for passes that add to `grad` and are no part of the step. Passes that leave `grad` alone don't need it,
        nor do passes that a `zero_grad` follows.

        >>> model = nn.Linear(8, 4)
        >>> optimizer = NGD(model)
        >>> with optimizer.paused():
        ...     model(torch.randn(32, 8)).square().mean().backward()  # a penalty, beside the loss
        >>> nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(4, (32,))).backward()
        >>> optimizer.step()
        """
        return self._capture.paused()

    def samples(self, count: int) -> AbstractContextManager[None]:
        """Returns a context that states the samples of each forward pass, if inputs and outputs don't tell.

        Raises: ConfigError for a count below 1.

        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> optimizer, x = NGD(model), torch.randn(32, 8)
        >>> with optimizer.samples(len(x)):
        ...     loss = model[0](x).square().mean()  # no call of the model itself
        >>> loss.backward()
        >>> optimizer.step()
        """
        if count < 1:
            raise ConfigError(f"samples must be >= 1, got {count}")
        return self._capture.batches.stated(count)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Forgets the statistics of passes whose gradients it clears; if there are any, it is collective.

        >>> model = nn.Linear(8, 4)
        >>> optimizer = NGD(model)
        >>> model(torch.randn(32, 8)).square().mean().backward()
        >>> optimizer.zero_grad()
        >>> model.weight.grad is None
        True
        """
        super().zero_grad(set_to_none)
        if self._capture.clear():
            self._begin_step(self.stats.step + 1)

    @overload
    def step(self, closure: None = None, *, objective: Objective | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, objective: Objective | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, objective: Objective | None = None) -> float | None:
        """Collective. Updates the parameters from their gradients; returns the closure's loss, if one is given.

        objective: returns (loss, output) of the batch, or of a part of it (`part_of`), without differentiating.
            Settings that adapt to the loss evaluate it again (`config.needs_objective`).

        If the `grad` of a parameter is None on every rank, the parameter is left alone, as by torch's optimizers; on
        some ranks, it counts as zero. Raises, on every rank: CaptureError if a layer had more micro-batches than the
        config says; NonFiniteError; InversionError; CollectiveError. ConfigError for parameters that NGD was not built
        with.

        >>> from ngd_dist.config import NGDConfig, QuadraticModel
        >>> model, x, y = nn.Linear(8, 4), torch.randn(32, 8), torch.randint(4, (32,))
        >>> def objective():
        ...     output = model(x)
        ...     return nn.functional.cross_entropy(output, y), output
        >>> optimizer = NGD(model, NGDConfig(step_length=QuadraticModel()))  # chooses lr and momentum
        >>> objective()[0].backward()
        >>> optimizer.step(objective=objective)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_call(objective)
        self._look_up_groups()
        due, phase = self._due, self._stopwatch.phase
        with torch.autocast(self._device.type, enabled=False):
            with phase("reduce"):
                means = self._collect(due)
            if not means.is_finite:
                self._skip()
                return loss
            with phase("refresh"):
                averaged = {key for key in due if not self._schedule.inverts(self.stats.step + 1, key)}
                reports = self._curvature.refresh(due, means, self._capture.estimates.seconds, averaged)
            with phase("apply"):
                directions = self._curvature.directions(means.gradients, self._capture.gradient_rows.of)
            with phase("publish"):
                result = self._sync.publish(self._local_result(directions, means, reports), due)
            self._curvature.note_refreshes(result.reports)
            self._check(result.reports)
            with phase("update"):
                adapted = self._update.move(
                    self.stats.step + 1,
                    self.param_groups,
                    self.state,
                    means,
                    result,
                    objective,
                    partial(self._gradients.of, self),
                )
        self._finish(due, result, adapted)
        self._take_in()
        return loss

    def explain(self) -> str:
        """Returns a table of each layer's method and cost, and the reason why the fallback has each other parameter.

        >>> print(NGD(nn.Sequential(nn.Linear(8, 4), nn.PReLU())).explain())
        kfac, empirical Fisher, adaptive refresh, single in one process
        <BLANKLINE>
        layer  kind          gradient  statistics    rank  refresh  apply  memory
        0      Linear, KFAC  4x9       A 9x9, G 4x4  0     ...
        left to the fallback, sgd at lr 0.1:
          1.weight  no layer kind covers PReLU
        """
        return explain(
            self.config,
            self._covered,
            self._engine,
            self._sync,
            self.plain_parameters,
            self._capture.activations,
            self.param_groups,
            self._frozen(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Collective. Returns the whole state on every rank: torch's, and under "ngd" that of each layer by name.

        >>> sorted(NGD(nn.Linear(8, 4)).state_dict())
        ['ngd', 'param_groups', 'state']
        """
        return super().state_dict() | {"ngd": self.saved_state.gather(self._comm, self.stats)}

    def state_dict_part(self) -> dict[str, Any]:
        """Returns this rank's part of `state_dict`: all of it but the layers that other ranks own. Not collective.

        >>> parts = [NGD(nn.Linear(8, 4)).state_dict_part()]  # of every rank, in any order
        >>> NGD(nn.Linear(8, 4)).load_state_dict(NGD.joined(parts))
        """
        return super().state_dict() | {"ngd": self.saved_state.part(self.stats)}

    @staticmethod
    def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the `state_dict` that the parts of all ranks make up; one that lacks some is refused at loading."""
        parts = list(parts)
        layers = {name: layer for part in parts for name, layer in part["ngd"]["layers"].items()}
        return dict(parts[0]) | {"ngd": parts[0]["ngd"] | {"layers": layers}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state saved at any world size. Raises: CheckpointError, with nothing changed, if it is unfit.

        >>> saved = NGD(nn.Linear(8, 4)).state_dict()
        >>> NGD(nn.Linear(8, 4)).load_state_dict(saved)
        """
        self._take_in()
        self.saved_state.check(state_dict, self.param_groups)
        self.stats = self.saved_state.restore(state_dict["ngd"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "ngd"})
        self._begin_step(self.stats.step + 1)

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

    def _collect(self, due: list[Key]) -> GlobalMeans:
        """Returns the global means: due statistics and gradients of the layers held here, and plain gradients."""
        check_held(layer for layer in self.layers if any(p.grad is None for p in layer.parameters))
        captured, wrong = self._capture.to_send(), self._capture.miscounted()
        for key, value in captured.items():
            self._sync.offer(key, value)
        counts = self._capture.estimates.counts(due, wrong, self._device, self._capture.measurement.spoiled)
        read = partial(self._gradients.of, self)
        gradients = {name: grad_BOI for stack in self._curvature.stacks for name, grad_BOI in stack.join(read)}
        plain = read(self._plain)
        flags = self._gradients.flags(self, self._device)
        return self._sync.collect(LocalContribution(flags, counts, gradients, plain))

    def _skip(self) -> None:
        """Gives the step up: weights, statistics and schedule stay. Raises: NonFiniteError, if the config says so."""
        is_scaled = hasattr(self, "found_inf")
        self._loss_scale.report_overflow(self)
        self._begin_step(self.stats.step + 1)
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

    def _local_result(
        self, directions: dict[str, Tensor], means: GlobalMeans, reports: dict[Key, RefreshReport]
    ) -> StepResult:
        like = torch.zeros((), dtype=self._sync.dtype, device=self._device)
        inner = self._update.length.inner(directions, means.gradients, like)
        return StepResult(directions, reports, inner)

    def _check(self, reports: Mapping[Key, RefreshReport]) -> None:
        """Raises on all ranks or on none: all have the same reports. A caller that catches the error may go on."""
        wrong = sorted({key.layer for key, report in reports.items() if report.verdict is Verdict.MISCOUNTED})
        bound, before = self.config.max_failed_inversions, self.stats.failed_inversions
        error = self._capture.miscount(wrong[0]) if wrong else too_many_failed(bound, before, reports)
        if error is not None:
            self._begin_step(self.stats.step + 1)
            raise error

    def _finish(self, due: list[Key], result: StepResult, adapted: Adapted) -> None:
        """Plans the next refreshes from the reports, the same on every rank, and writes the step's statistics."""
        step, reports = self.stats.step + 1, result.reports
        unseen = (key.layer for key in due if reports[key].verdict is Verdict.UNSEEN)
        self._report_unseen(name for name in unseen if self._sync.reports(name))
        verdicts, rows = ({key: getattr(reports[key], name) for key in due} for name in ("verdict", "rows"))
        before = dict(self._schedule.tracks)
        self._schedule.advance(step, verdicts, rows)
        due_reports, tracks = {key: reports[key] for key in due}, self._schedule.tracks.values()
        self.stats = StepStats(
            step=step,
            seconds=self._stopwatch.take(),
            bytes_sent=self._comm.take_sent(),
            ages=[step - track.refreshed for track in tracks],
            intervals=[track.interval for track in tracks],
            refreshes=self._curvature.telemetry_of(due_reports, before, self._schedule.tracks, step),
            failed_inversions=failed_inversions(self.stats.failed_inversions, reports),
            skipped_steps=self.stats.skipped_steps,
            lr=float(self.param_groups[0]["lr"]),
            momentum=float(self.param_groups[0]["momentum"]),
            damping=float(self.param_groups[0]["damping"]),
            adapted=adapted,
        )
        self._begin_step(step + 1)

    def _report_unseen(self, layers: Iterable[str]) -> None:
        """Warns once for each layer that has gradients but never ran: something uses its weights without its module."""
        for name in set(layers):
            parameters = self._covered[name].layer.parameters
            if (
                not self._curvature.caches.has(name)
                and name not in self._unseen
                and any(p.grad is not None for p in parameters)
            ):
                self._unseen.add(name)
                logger.warning("layer %r takes a plain gradient step: its weights are used without its module", name)

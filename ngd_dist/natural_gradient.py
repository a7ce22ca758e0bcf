"""The natural gradient of a step, without the update that follows: capture, curvature, and their movement.

`NGD` and `Preconditioner` differ by the parts of the step after that.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.assembly import Assembly
from ngd_dist.capture.coverage import check_held
from ngd_dist.curvature import failed_inversions, too_many_failed
from ngd_dist.distributed import GlobalMeans, LocalContribution, RefreshReport, StepResult
from ngd_dist.errors import CaptureError, ConfigError
from ngd_dist.explanation import explain
from ngd_dist.statistics.staleness import Verdict
from ngd_dist.statistics.statistic import Key
from ngd_dist.step.joining import cut, join_pieces
from ngd_dist.step.layer_watch import is_watched
from ngd_dist.telemetry import Adapted, LayerStats, StepStats

__all__ = ["NaturalGradient"]

logger = logging.getLogger(__name__)


class NaturalGradient(Assembly):
    """The members that `NGD` and `Preconditioner` share."""

    @property
    def statistic_names(self) -> list[str]:
        """Returns "layer.statistic" for every statistic, in the order of `stats.ages` and `stats.intervals`."""
        return [str(key) for key in self._schedule.tracks]

    @property
    def owners(self) -> list[int | None]:
        """Returns the rank that inverts each statistic, in the order of `statistic_names`; None: all ranks do.

        >>> NGD(nn.Linear(8, 4)).owners
        [0, 0]
        """
        roles = self._sync.placement.roles
        layers = [key.layer for key in self._schedule.tracks]
        return [None if self._sync.is_replicated(layer) else roles[layer].owner for layer in layers]

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

    def watch(self) -> None:
        """From now on `stats.layers` tells gradient, update and spectra of each layer. Every rank calls it.

        They are measured in some steps: in each of the first 15, then more rarely, from step 256 on in every 32nd. The
        step after it tells them, since the host then has waited for the device anyway.

        >>> model = nn.Linear(8, 4)
        >>> optimizer = NGD(model)
        >>> optimizer.watch()
        >>> for _ in range(2):
        ...     nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(4, (32,))).backward()
        ...     optimizer.step()
        >>> optimizer.stats.layers.step, len(optimizer.stats.layers.cosines)
        (1, 1)
        """
        self._is_watched = True
        self._watch_layers()

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
        if self._engine.steps_itself and self._capture.has_gradients:
            raise ConfigError(f"{self._engine.averager} clears gradients by itself: leave zero_grad out")
        super().zero_grad(set_to_none)
        if self._capture.clear():
            self._begin_step(self.stats.step + 1)

    def skip(self) -> None:
        """Collective. Tells that the engine or the loop has skipped this step: its gradients were not used.

        An engine skips a step if 16-bit gradients have overflowed, say. What the step has captured is
        forgotten, and `stats.skipped_steps` counts it; weights, statistics and schedule stay.

        >>> model = nn.Linear(8, 4)
        >>> optimizer = NGD(model)
        >>> model(torch.randn(32, 8)).square().mean().backward()
        >>> optimizer.skip()
        >>> optimizer.stats.step, optimizer.stats.skipped_steps
        (0, 1)
        """
        self._begin_step(self.stats.step + 1)
        self.stats = replace(
            self.stats,
            skipped_steps=self.stats.skipped_steps + 1,
            seconds=self._stopwatch.take(),
            bytes_sent=self._comm.take_sent(),
            refreshes=[],
            adapted=Adapted(),
            layers=None,
        )

    def explain(self) -> str:
        """Returns a table of each layer's method and cost, and the reason why the fallback has each other parameter.

        >>> print(NGD(nn.Sequential(nn.Linear(8, 4), nn.PReLU())).explain())
        kfac, empirical Fisher, adaptive refresh, single in one process
        <BLANKLINE>
        layer  kind          gradient  statistics    rank  refresh  apply  memory
        0      Linear, KFAC  4x9       A 9x9, G 4x4  0     ...
        left to the fallback, adamw at lr 0.01:
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
            updates_weights=self.updates_weights,
        )

    def state_dict(self) -> dict[str, Any]:
        """Collective. Returns the whole state on every rank: torch's, and under "ngd" that of each layer by name.

        >>> sorted(NGD(nn.Linear(8, 4)).state_dict())
        ['ngd', 'param_groups', 'state']
        """
        if self._engine.is_sharded:
            return self.joined(self._comm.all_gather_object("state_dict", self.state_dict_part()))
        return super().state_dict() | {"ngd": self.saved_state.gather(self._comm, self.stats)}

    def state_dict_part(self) -> dict[str, Any]:
        """Returns this rank's part of `state_dict`: all of it but the layers that other ranks own. Not collective.

        >>> parts = [NGD(nn.Linear(8, 4)).state_dict_part()]  # of every rank, in any order
        >>> NGD(nn.Linear(8, 4)).load_state_dict(NGD.joined(parts))
        """
        part = super().state_dict() | {"ngd": self.saved_state.part(self.stats)}
        if self._engine.is_sharded:
            part["ngd"]["ranges"] = self._ranges()
        return part

    @staticmethod
    def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the `state_dict` that the parts of all ranks make up; one that lacks some is refused at loading."""
        parts = list(parts)
        layers = {name: layer for part in parts for name, layer in part["ngd"]["layers"].items()}
        whole = join_pieces(parts) if "ranges" in parts[0]["ngd"] else dict(parts[0])
        return whole | {"ngd": whole["ngd"] | {"layers": layers}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state saved at any world size. Raises: CheckpointError, with nothing changed, if it is unfit.

        >>> saved = NGD(nn.Linear(8, 4)).state_dict()
        >>> NGD(nn.Linear(8, 4)).load_state_dict(saved)
        """
        self._take_in()
        self.saved_state.check(state_dict, self.param_groups)
        torchs = {key: value for key, value in state_dict.items() if key != "ngd"}
        saved, momentum = state_dict["ngd"], dict[nn.Parameter, Tensor]()
        if self._engine.is_sharded:
            momentum = self._cut_momentum(torchs["state"])
            torchs["state"], saved = {}, saved | {"fallback": self._cut_fallback(saved["fallback"])}
        self.stats = self.saved_state.restore(saved)
        super().load_state_dict(torchs)
        for p, buffer in momentum.items():
            self.state[p]["momentum_buffer"] = buffer
        self._begin_step(self.stats.step + 1)

    def _directions(self, due: list[Key]) -> tuple[GlobalMeans, StepResult] | None:
        """Collective. Returns the gradients and the directions of a step; None, on all ranks, if it is given up."""
        phase = self._stopwatch.phase
        with phase("reduce"):
            means = self._collect(due)
        if not means.is_finite:
            self._give_up()
            return None
        with phase("refresh"):
            averaged = {key for key in due if not self._schedule.inverts(self.stats.step + 1, key)}
            reports = self._curvature.refresh(due, means, self._capture.estimates.seconds, averaged)
        with phase("apply"):
            directions = self._curvature.directions(means.gradients, self._capture.gradient_rows.of)
        with phase("publish"):
            directions = self._sync.averaged(directions, self._curvature.lacking(directions))
            if self._watch is not None and is_watched(self.stats.step + 1):
                self._watch.measure(directions, means.gradients, self._device)
            result = self._sync.publish(self._local_result(directions, means, reports), due)
        self._curvature.note_refreshes(result.reports)
        self._check(result.reports)
        return means, result

    def _begin_call(self) -> list[Key]:
        """Returns the statistics that are due in the step that begins. Raises: ConfigError; CaptureError."""
        self._engine.check_step()
        if self._capture.needs_fisher_pass and not self._capture.fisher_passes:
            raise CaptureError(
                f"fisher {self.config.fisher.kind!r} needs gradients of the model's predictions: call "
                "optimizer.fisher_backward(output) after each forward pass, before loss.backward()"
            )
        self._look_up_groups()
        return self._due

    def _collect(self, due: list[Key]) -> GlobalMeans:
        """Returns the global means: due statistics and gradients of the layers held here, and plain gradients."""
        check_held(layer for layer in self.layers if any(p.grad is None for p in layer.parameters))
        captured, wrong = self._capture.to_send(), self._capture.miscounted()
        for key, value in captured.items():
            self._sync.offer(key, value)
        counts = self._capture.estimates.counts(due, wrong, self._device, self._capture.measurement.spoiled)
        read = partial(self._gradients.of, self)
        self._gradients.begin()
        if self._sync.pieces is None:
            gradients = {name: grad_BOI for stack in self._curvature.stacks for name, grad_BOI in stack.join(read)}
        else:
            pieces = {self._names[p]: x.gradient for p, x in self._gradients.pieces.items() if x.gradient is not None}
            gradients = self._sync.pieces.gather(pieces)
        plain = read(self._plain)
        flags = self._gradients.flags(self, self._device)
        return self._sync.collect(LocalContribution(flags, counts, gradients, plain))

    def _give_up(self) -> None:
        """Skips a step with a gradient that is not finite. Raises: NonFiniteError, if the config says so."""
        goes_on = hasattr(self, "found_inf") or self.config.non_finite == "skip"
        error = None if goes_on else self._gradients.error(self.stats.step + 1)
        self._loss_scale.report_overflow(self)
        self.skip()
        if error is not None:
            raise error

    def _ranges(self) -> dict[str, tuple[int, tuple[int, ...], int]]:
        """Returns of each parameter its place in torch's state, its whole shape, and the beginning of its piece."""
        pieces = self._gradients.pieces
        return {
            name: (place, tuple(self._shapes[name]), pieces[p].start if p in pieces else 0)
            for place, (p, name) in enumerate(self._names.items())
        }

    def _cut_momentum(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[nn.Parameter, Tensor]:
        """Returns this rank's pieces of the momentum in torch's part of a whole state."""
        momentum = {}
        for place, (p, name) in enumerate(self._names.items()):
            piece, buffer = self._gradients.pieces.get(p), state.get(place, {}).get("momentum_buffer")
            if piece is not None and buffer is not None:
                of_rank = cut(buffer, piece.start, piece.weight.numel(), name, self._shapes[name])
                momentum[p] = of_rank.to(piece.weight, copy=True)
        return momentum

    def _cut_fallback(self, saved: Mapping[str, Mapping[str, Tensor]] | None) -> dict[str, dict[str, Tensor]] | None:
        """Returns this rank's pieces of the fallback's moments in a whole state."""
        if saved is None:
            return None
        pieces = {self._names[p]: piece for p, piece in self._gradients.pieces.items()}
        return {
            name: {
                key: cut(value, piece.start, piece.weight.numel(), name, self._shapes[name]) if value.ndim else value
                for key, value in saved[name].items()
            }
            for name, piece in pieces.items()
            if name in saved
        }

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
        layers = self._tell_layers(step)
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
            layers=layers,
        )
        self._begin_step(step + 1)

    def _tell_layers(self, step: int) -> LayerStats | None:
        """Collective if the layers were measured in this step. Returns what was measured in an earlier one."""
        if self._watch is None:
            return None
        with self._stopwatch.phase("telemetry"):
            told = self._watch.take()
            factors, spectra = self._update.factors, self._curvature.spectra
            assert spectra is not None
            is_told = self._watch.has_measured and factors is not None
            estimates = spectra.estimate(self._curvature.problem) if is_told else []
            self._watch.send(step, factors, spectra.exact, estimates, updates_weights=self.updates_weights)
        return told

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

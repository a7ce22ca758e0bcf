"""DeepSpeed's ZeRO: stage 0 averages whole gradients, stages 1 to 3 leave each rank a range of the flattened weights.

The names with an underscore are those that DeepSpeed's own universal checkpoints are built on (0.18 and 0.19).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ngd_dist.config import NGDConfig
from ngd_dist.config.deepspeed import check_deepspeed, refusal_at_stage
from ngd_dist.engines.engine import Engine, Piece
from ngd_dist.errors import ConfigError

__all__ = ["DeepSpeed", "Inner", "initialize"]

Settings = Mapping[str, Any]
SHARDING = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"}


class Inner(torch.optim.Optimizer):
    """The optimizer to give to DeepSpeed for an `NGD` on its engine, which takes its place in every step.

    >>> inner = Inner(nn.Linear(8, 4).parameters())
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})
        self.update: Callable[[], None] | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does the step of the NGD that was built on the engine. Raises: ConfigError if none was."""
        if self.update is None:
            raise ConfigError("DeepSpeed was given Inner, and no NGD was built on its engine: NGD(engine, config)")
        self.update()


def initialize(model: nn.Module, config: Settings, optimizer: Any = Inner) -> Any:
    """Returns `deepspeed.initialize`'s engine. Collective.

    config: as DeepSpeed's JSON; the keys that the natural gradient decides are filled in (`gradient_clipping`: 0.0).
    optimizer: `Inner` for an `NGD` on the engine; for a `Preconditioner` any optimizer of the model's parameters, in
        one param group. On a CPU nothing is compiled: DeepSpeed would build its shared-memory collectives.

    Raises: ConfigError for keys of another value.

        engine = initialize(model, {"train_micro_batch_size_per_gpu": 64, "zero_optimization": {"stage": 2}})
        optimizer = NGD(engine, NGDConfig(lr=0.1))
        engine.backward(loss_fn(engine(x), y))
        engine.step()
    """
    decided: dict[str, Any] = {
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in decided.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{key} must be {value}, got {config[key]!r}: leave it out; `clip` of NGDConfig clips")
    whole = {**config, **decided}
    _check(whole)
    deepspeed: Any = import_module("deepspeed")
    if next(model.parameters()).device.type == "cpu":
        import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=whole)
    return engine


class DeepSpeed(Engine):
    """The engine that `deepspeed.initialize` returns, at ZeRO stages 0 to 3. It calls the optimizer in its own step."""

    averages_gradients = True
    averager = "DeepSpeed"
    steps_itself = True

    def __init__(self, engine: Any = None) -> None:
        self._engine = engine
        self._is_stepping = False
        if engine is not None:
            self._stage = int(engine.zero_optimization_stage())
            self.averager = f"DeepSpeed ZeRO {self._stage}"
            self.is_sharded, self.keeps_gradients = self._stage > 0, self._stage == 0
            self._inner: torch.optim.Optimizer = engine.basic_optimizer

    def inside(self, model: nn.Module) -> nn.Module | None:
        kind = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
        return model.module if kind is not None and isinstance(model, kind) else None

    def bound(self, model: nn.Module) -> Engine:
        engine: Any = model
        if type(engine).__name__ != "DeepSpeedEngine":
            raise ConfigError(f"NGD does not support DeepSpeed's {type(engine).__name__}, but its plain engine alone")
        _check(engine.config if isinstance(engine.config, Mapping) else engine._config._param_dict)
        kind, stage = type(engine.optimizer).__name__, int(engine.zero_optimization_stage())
        if stage == 0 and engine.optimizer is not engine.basic_optimizer:
            raise ConfigError("ZeRO stage 0 is supported in float32 alone: take stage 1 for 16 bits")
        if stage > 0 and kind not in SHARDING:
            raise ConfigError(
                f"NGD does not support DeepSpeed's {kind}: leave out data_types.grad_accum_dtype and offload"
            )
        groups = len(engine.basic_optimizer.param_groups)
        if groups != 1:
            raise ConfigError(
                f"the optimizer inside DeepSpeed must have one param group, got {groups}: it is called once for each, "
                "before the next one has its gradients; NGD's own param_groups have lr and decay by parameter"
            )
        if stage == 3 and len(engine.optimizer.fp16_groups) != 1:
            raise ConfigError("leave out zero_optimization.sub_group_size: all parameters must be stepped together")
        return DeepSpeed(engine)

    def owned(self, parameter: nn.Parameter) -> str | None:
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            return "DeepSpeed owns it; build the optimizer on the engine that deepspeed.initialize returns: NGD(engine)"
        return None

    def fitted(self, config: NGDConfig) -> NGDConfig:
        if (problem := refusal_at_stage(config, self._stage, self.averager)) is not None:
            raise ConfigError(problem)
        passes = int(self._engine.gradient_accumulation_steps())
        if "micro_batches" not in config.model_fields_set:
            return config.model_copy(update={"micro_batches": passes})
        if config.micro_batches not in (passes, "any"):
            raise ConfigError(
                f"micro_batches must be {passes}, DeepSpeed's gradient_accumulation_steps, got {config.micro_batches}: "
                "leave it out"
            )
        return config

    def check_ranks(self, model: nn.Module, rank: int, world_size: int) -> None:
        size = int(self._engine.dp_world_size)
        if size != world_size:
            raise ConfigError(f"DeepSpeed averages over {size} ranks, and the process group has {world_size}")

    def check_reduction(self, loss_reduction: str) -> None:
        if loss_reduction == "sum":
            raise ConfigError(f"loss_reduction 'sum' needs the bare model: {self.averager} divides by the ranks")

    def check_unfrozen(self, count: int) -> None:
        raise ConfigError(
            f"{count} parameters were unfrozen after deepspeed.initialize: build its engine again, and NGD"
        )

    def check_foreign(self, count: int) -> None:
        raise ConfigError(
            f"DeepSpeed averages its model's gradients alone: {count} in param_groups are not of the model"
        )

    def whole_shapes(self, model: nn.Module) -> AbstractContextManager[object]:
        partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
        return _expanded(partitioned) if partitioned else nullcontext()

    @torch.no_grad()
    def pieces(self, parameters: Iterable[nn.Parameter]) -> Mapping[nn.Parameter, Piece]:
        pieces = self._pieces_of_3() if self._stage == 3 else self._pieces_of_1(parameters)
        wanted = set(parameters)
        return {p: piece for p, piece in pieces if p in wanted}

    def loss_scale(self) -> float:
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def beside(self, outputs: Iterable[Tensor]) -> AbstractContextManager[object]:
        managers = [manager for x in outputs for manager in getattr(x, "_backward_hook_managers", ())]
        if not managers:
            raise ConfigError("give fisher_backward what DeepSpeed's engine returned, and no tensor made of that")
        return _resting(managers)

    def attach(self, step: Callable[[], None], *, is_update: bool) -> None:
        def stepping(*_: Any) -> None:
            self._is_stepping = True
            try:
                step()
            finally:
                self._is_stepping = False

        if is_update and not isinstance(self._inner, Inner):
            raise ConfigError(
                f"NGD takes the place of the optimizer inside DeepSpeed, which is {type(self._inner).__name__}: give "
                "ngd_dist.engines.Inner to deepspeed.initialize, or build a Preconditioner"
            )
        if isinstance(self._inner, Inner):
            if not is_update:
                raise ConfigError(
                    "a Preconditioner needs an optimizer after it: give deepspeed.initialize one, no Inner"
                )
            self._inner.update = stepping
        else:
            self._inner.register_step_pre_hook(stepping)

    def check_step(self) -> None:
        if not self._is_stepping:
            raise ConfigError("DeepSpeed's engine calls the optimizer by itself: call engine.step(), and that alone")

    def lr(self, group: Mapping[str, Any]) -> float:
        return float(self._inner.param_groups[0]["lr"])

    def _pieces_of_1(self, parameters: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Parameter, Piece]]:
        partitions: list[Tensor] = self._engine.optimizer.single_partition_of_fp32_groups
        for p in parameters:
            if not hasattr(p, "_hp_mapping"):
                raise ConfigError(
                    f"a trainable parameter of shape {list(p.shape)} is not among those that DeepSpeed was given: give "
                    "deepspeed.initialize all of them"
                )
            mapping: Any = p._hp_mapping
            if mapping is not None:
                flat, at = partitions[mapping.param_group_index], mapping.hp_fragment_address
                yield p, _piece(mapping.lp_fragment_address.start, flat, at.start, at.numel)

    def _pieces_of_3(self) -> Iterator[tuple[nn.Parameter, Piece]]:
        zero, rank = self._engine.optimizer, int(torch.distributed.get_rank(self._engine.optimizer.dp_process_group))
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            at = 0
            for p in group:
                size = int(p.partition_numel())  # the last one is padded
                start = rank * size
                length = max(0, min(size, int(p.ds_numel) - start))
                if length:
                    yield p, _piece(start, flat, at, length)
                at += size


def _piece(start: int, flat: Tensor, at: int, length: int) -> Piece:
    gradient = None if flat.grad is None else flat.grad.narrow(0, at, length)
    return Piece(int(start), gradient, flat.detach().narrow(0, at, length))


def _check(config: Settings) -> None:
    refusals = check_deepspeed(config, of_job=False)
    if refusals:
        raise ConfigError(f"DeepSpeed's configuration: {'; '.join(refusals)}")


@contextmanager
def _resting(managers: Iterable[Any]) -> Iterator[None]:
    """Keeps the hooks on a model's outputs from beginning a backward pass of training, and from scaling it."""
    before = [(manager, manager.preprocess_done, manager.preprocess_per_tensor_fn) for manager in managers]
    try:
        for manager, _, _ in before:
            manager.preprocess_done, manager.preprocess_per_tensor_fn = True, None
        yield
    finally:
        for manager, is_done, scaled in before:
            manager.preprocess_done, manager.preprocess_per_tensor_fn = is_done, scaled


@contextmanager
def _expanded(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gives partitioned parameters tensors of their whole shapes that take the memory of one number."""
    before = [(p, p.data) for p in parameters]
    try:
        for p, data in before:
            p.data = data.new_zeros(1).expand(p.ds_shape)  # type: ignore[attr-defined]
        yield
    finally:
        for p, data in before:
            p.data = data

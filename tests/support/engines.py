"""One small net, trained for some steps under any engine: in one process on the global batch, or on ranks."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig, Preconditioner
from ngd_dist.config import FixedInterval, OwnerSharded

SAMPLES, STEPS, LENGTH, WORDS, CLASSES = 16, 6, 4, 11, 3
FLOAT64 = ("bare", "ddp", "fsdp2")
ZERO = ("zero0", "zero1", "zero2", "zero3")
# Each layer has one owner: the default would have layers as small as these on all ranks.
BASE: dict[str, Any] = {
    "lr": 0.1,
    "damping": 0.01,
    "staleness": FixedInterval(steps=2),
    "strategy": OwnerSharded(replicate_below=0),
}
Loss = Callable[[Tensor, Tensor], Tensor]
Weights = dict[str, Tensor]


class Net(nn.Module):
    """An embedding, linear layers, a norm, a parameter that no layer covers, and a bias of fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.hidden = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.gate = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7))
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.hidden(self.embedding(x))))
        pooled = (h * torch.sigmoid(self.gate(h)) * self.scale).mean(1)
        logits: Tensor = self.head(pooled)
        return logits


class Unused(Net):
    """Has a layer and a parameter that get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.extra = nn.Linear(7, 5), nn.Parameter(torch.ones(3))


class Checkpointed(Net):
    """Runs its layers again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: self.norm(torch.tanh(self.hidden(x))), self.embedding(x), use_reentrant=False)
        pooled = (h * torch.sigmoid(self.gate(h)) * self.scale).mean(1)
        logits: Tensor = checkpoint(self.head, pooled, use_reentrant=False)
        return logits


class Images(nn.Module):
    """A convolution, a group norm, a transposed convolution, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.relu(self.norm(self.patches(x)))).flatten(2).mT
        logits: Tensor = self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))
        return logits


class Recurrent(nn.Module):
    """Recurrent modules, one with weights that FSDP2 shards for it alone and one of the root's group, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.both = nn.GRU(6, 3, bidirectional=True, batch_first=True)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.cell = nn.LSTMCell(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (h, _) = self.lstm(self.both(self.embedding(x))[0])
        state = self.cell(outputs[:, 0])
        logits: Tensor = self.head(self.cell(h[-1], state)[0])
        return logits


class Tied(Net):
    """Its last layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Linear(7, 6)
        self.words = nn.Linear(6, WORDS, bias=False)
        self.words.weight = self.embedding.weight
        self.head = nn.Linear(WORDS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.hidden(self.embedding(x)))).mean(1) * self.scale
        logits: Tensor = self.head(torch.tanh(self.words(self.back(h)))) * torch.sigmoid(self.gate(h))
        return logits


@dataclass(frozen=True)
class Case:
    """Settings of NGD or, with `inner`, of a Preconditioner before that optimizer; passes: of a step on each rank.

    factor: of the loss. lrs: of each step, set in the optimizer's param groups; none: it stays. deepspeed: keys beside
    those of every case. is_bfloat16: whether the model runs in 16 bits under FSDP2. frozen: the module that is not
    trained. has_groups: whether the head has a param group of its own.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    factor: float = 1.0
    inner: Callable[[Any], torch.optim.Optimizer] | None = None
    has_fisher_passes: bool = False
    lrs: tuple[float, ...] = ()
    deepspeed: dict[str, Any] = field(default_factory=dict)
    net: type[nn.Module] = Net
    is_bfloat16: bool = False
    frozen: str = ""
    has_groups: bool = False


def batch_of(step: int, net: type[nn.Module]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return (tokens if net is not Images else torch.randn(SAMPLES, 1, 5, 5, generator=generator)), y


def new_net(dtype: torch.dtype, kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


class Run:
    """A model in training under one engine, on this rank."""

    def __init__(self, engine: str, case: Case, *, state: Any = None, weights: Weights | None = None) -> None:
        self.kind, self.case = engine, case
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.dtype = torch.float64 if engine in FLOAT64 else torch.float32
        self.net = new_net(self.dtype, case.net)
        if case.frozen:
            self.net.get_submodule(case.frozen).requires_grad_(False)
        if weights is not None:
            self.net.load_state_dict({name: weight.to(self.dtype) for name, weight in weights.items()})
        base = {key: value for key, value in BASE.items() if key != "lr" or case.inner is None}
        config = NGDConfig(**base | {"micro_batches": case.passes} | case.settings)
        self.inner: torch.optim.Optimizer | None = None
        self.model = self._wrapped()
        self.optimizer: Any = (NGD if case.inner is None else Preconditioner)(
            self.model, config, param_groups=self._groups()
        )
        if state is not None:
            self.optimizer.load_state_dict(state)

    def _groups(self) -> list[dict[str, Any]] | None:
        if not self.case.has_groups:
            return None
        head = [*self.net.get_submodule("head").parameters()]
        rest = [p for p in self.net.parameters() if all(p is not other for other in head)]
        return [{"params": rest}, {"params": head, "lr": 0.03, "momentum": 0.5, "weight_decay": 0.2, "damping": 0.1}]

    def _wrapped(self) -> Any:
        net, case = self.net, self.case
        if self.kind in ZERO:
            from ngd_dist.engines.deepspeed import Inner, initialize

            prepare_deepspeed()
            settings = {
                "train_micro_batch_size_per_gpu": SAMPLES // self.world_size // case.passes,
                "gradient_accumulation_steps": case.passes,
                "zero_optimization": {"stage": int(self.kind[-1])},
                **case.deepspeed,
            }
            inner = Inner if case.inner is None else case.inner(net.parameters())
            return initialize(net, settings, inner)
        model: nn.Module = net
        if self.kind == "ddp":
            model = DistributedDataParallel(net)
        if self.kind == "fsdp2":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if case.is_bfloat16 else None)
            # Others are in the root's own group, and so are weights that two modules share.
            for layer in [] if case.net is Tied else list(net.children())[::2]:
                fully_shard(layer, mp_policy=policy)
            fully_shard(net, mp_policy=policy)
        if case.inner is not None:
            self.inner = case.inner(net.parameters())
        return model

    def step(self, number: int) -> None:
        """One step on this rank's part of the global batch."""
        for group in self.optimizer.param_groups if self.case.lrs else []:
            group["lr"] = self.case.lrs[number]
        of_rank = slice(self.rank * SAMPLES // self.world_size, (self.rank + 1) * SAMPLES // self.world_size)
        parts = (whole[of_rank].chunk(self.case.passes) for whole in batch_of(number, self.case.net))
        for number_of_pass, (x, y) in enumerate(zip(*parts, strict=True), start=1):
            if self.kind == "fsdp2":
                self.model.set_requires_gradient_sync(number_of_pass == self.case.passes)
            x = x.to(next(self.net.parameters()).dtype) if x.is_floating_point() else x
            output = self.model(x)
            if self.case.has_fisher_passes:
                self.optimizer.fisher_backward(output)
            loss = F.cross_entropy(output.float() if output.itemsize == 2 else output, y) * self.case.factor
            if self.kind in ZERO:
                self.model.backward(loss)
                self.model.step()
            else:
                (loss / self.case.passes).backward()
        if self.kind in ZERO:
            if not self.model.was_step_applied():
                self.optimizer.skip()
            return
        if self.inner is None:
            self.optimizer.step()
        elif self.optimizer.step():
            self.inner.step()
        self.optimizer.zero_grad()

    def weights(self) -> Weights:
        """Collective. Returns the whole weights, in float64."""
        if self.kind == "zero3":
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.net.parameters())):
                return {name: p.detach().double().clone() for name, p in self.net.named_parameters()}
        whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in self.net.named_parameters()}
        return {name: p.detach().double().clone() for name, p in whole.items()}

    def close(self) -> None:
        if self.kind in ZERO:
            self.model.destroy()


def train(engine: str, case: Case, *, then: str | None = None, steps: int = STEPS) -> Weights:
    """Returns the weights after some steps; `then`: the engine of their second half, on a new model and optimizer."""
    run = Run(engine, case)
    for number in range(steps):
        if number == steps // 2 and then is not None:
            weights, state = run.weights(), run.optimizer.state_dict()
            run.close()
            run = Run(then, case, state=state, weights=weights)
        run.step(number)
    weights = run.weights()
    run.close()
    return weights


def prepare_deepspeed() -> None:
    """Makes DeepSpeed quiet, and willing to train in float16 on every CPU: it asks for one that is fast at it."""
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True


@contextmanager
def launched(rank: int, world_size: int) -> Iterator[None]:
    """Sets the variables that DeepSpeed reads, and hides compilers from it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu", PATH="/nonexistent"
    )
    yield

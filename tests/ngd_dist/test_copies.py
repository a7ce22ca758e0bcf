"""Models and optimizers that are saved, copied and sent; models that torch.func runs; parts that engines replace."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import EKFAC, KFAC, LNGD, SENG, SINGD, TKFAC, AdamWFallback, Eva, FixedInterval, SGDFallback
from ngd_dist.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.tensors import flat
from tests.support.training import train

METHODS = {
    "kfac": KFAC(),
    "ekfac": EKFAC(),
    "lngd": LNGD(),
    "tkfac": TKFAC(),
    "eva": Eva(),
    "singd": SINGD(),
    "seng": SENG(),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.act, self.head = nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        logits: Tensor = self.head(self.act(self.norm(mixed + x)).mean(1))
        return logits


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(32, 3, 8), torch.randint(0, 4, (32,))


def trained(method: str = "kfac") -> tuple[Net, NGD]:
    model = Net()
    config = NGDConfig(
        lr=0.05, preconditioner=METHODS[method], fallback=AdamWFallback(), staleness=FixedInterval(steps=2)
    )
    optimizer = NGD(model, config)
    train(optimizer, model, *batch(), 3)
    return model, optimizer


LOAD = """
import sys, torch
sys.path.insert(0, {folder!r})
sys.modules["ngd_dist"] = None  # importing it is an error
import saved_net
model = torch.load({path!r}, weights_only=False)
model(torch.zeros(2, 3, 8)).sum().backward()
torch.save(model, {path!r})
print("loaded", len(list(model.parameters())))
"""


def test_a_model_is_saved_and_loaded_without_this_library(tmp_path: Path) -> None:
    source = Path(__file__).read_text()
    net = source[source.index("class Net") : source.index("def batch")]
    (tmp_path / "saved_net.py").write_text(f"import torch\nfrom torch import Tensor, nn\n\n\n{net}")
    sys.path.insert(0, str(tmp_path))
    try:
        import saved_net

        model = saved_net.Net()
        optimizer = NGD(model, NGDConfig(preconditioner=LNGD(), lr=0.01))
        train(optimizer, model, *batch(), 1)
        torch.save(model, tmp_path / "model.pt")
    finally:
        sys.path.remove(str(tmp_path))

    program = LOAD.format(folder=str(tmp_path), path=str(tmp_path / "model.pt"))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == f"loaded {len(list(model.parameters()))}"


def test_a_copy_of_the_model_is_watched_by_nobody() -> None:
    model, optimizer = trained()
    x, y = batch()
    twin = copy.deepcopy(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    expected = {str(key): value.clone() for key, value in optimizer._capture.take().items()}

    F.cross_entropy(twin(3 * x), y).backward()
    torch.save(copy.deepcopy(twin), io.BytesIO())

    assert all(torch.equal(value, expected[str(key)]) for key, value in optimizer._capture.take().items())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_both_goes_on_as_they_do(method: str, way: str) -> None:
    model, optimizer = trained(method)
    if way == "deepcopy":
        twin, copied = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        buffer = io.BytesIO()
        torch.save((model, optimizer), buffer)
        buffer.seek(0)
        twin, copied = torch.load(buffer, weights_only=False)

    train(copied, twin, *batch(), 3)
    untouched = flat(model)
    train(optimizer, model, *batch(), 3)

    assert not torch.equal(untouched, flat(model))
    assert torch.equal(flat(twin), flat(model))
    assert copied.stats.step == optimizer.stats.step == 6


def test_a_copy_of_the_optimizer_alone_updates_a_copy_of_the_model() -> None:
    model, optimizer = trained()
    before = flat(model)

    copied = copy.deepcopy(optimizer)
    for group in copied.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    copied.step()

    assert torch.equal(flat(model), before)
    assert copied.stats.step == 4


def step_there(pair: Any, results: Any) -> None:
    model, optimizer = pair
    train(optimizer, model, *batch(), 1)
    results.put(flat(model).tolist())


def test_both_are_sent_to_another_process() -> None:
    model, optimizer = trained()
    context = mp.get_context("spawn")
    results = context.Queue()
    twin, copied = copy.deepcopy((model, optimizer))
    process = context.Process(target=step_there, args=((twin, copied), results))

    process.start()
    found = torch.tensor(results.get(timeout=120))
    process.join()

    train(optimizer, model, *batch(), 1)
    torch.testing.assert_close(found, flat(model))


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_torch_func_runs_the_model_at_a_due_step(method: str) -> None:
    x, y = batch()
    weights = []
    for probes in (True, False):
        model = Net()
        optimizer = NGD(model, NGDConfig(lr=0.05, preconditioner=METHODS[method], staleness=FixedInterval()))
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if probes:
                parameters = {name: p.detach() for name, p in model.named_parameters()}

                def of_one(given: dict[str, Tensor], a: Tensor, b: Tensor, model: nn.Module = model) -> Tensor:
                    return F.cross_entropy(functional_call(model, given, (a[None],)), b[None])

                each = vmap(grad(of_one), in_dims=(None, 0, 0))(parameters, x, y)
                assert each["head.weight"].shape == (32, 4, 8)
                jacrev(lambda given, model=model: functional_call(model, given, (x[:2],)))(parameters)
            loss.backward()
            optimizer.step()
        weights.append(flat(model))

    assert torch.equal(*weights)


def test_a_pass_with_other_weights_in_the_models_place_measures_nothing() -> None:
    """As in MAML: the gradient of the model's own weights comes through those that stand in for them."""
    x, y = batch()
    model = Net()
    optimizer = NGD(model)
    fast = {name: p * 0.9 for name, p in model.named_parameters()}

    F.cross_entropy(functional_call(model, fast, (x,)), y).backward()

    assert optimizer._capture.take() == {}
    optimizer.step()


# --- what is no longer as it was --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("late", ["parametrizations", "old", "pruning", "assignment"])
def test_a_weight_that_is_replaced_later_is_an_error_that_says_so(late: str) -> None:
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = NGD(model)
    if late == "parametrizations":
        nn.utils.parametrizations.weight_norm(model[0])
    elif late == "old":
        nn.utils.weight_norm(model[0])
    elif late == "pruning":
        from torch.nn.utils import prune

        prune.l1_unstructured(model[0], "weight", 0.5)
        model[0].bias.requires_grad_(False)
    else:
        model[0].weight = nn.Parameter(torch.randn(3, 4))
    model(x).square().sum(1).mean().backward()

    with pytest.raises(ConfigError, match=r"Linear '0' no longer holds the weight.*before you build NGD"):
        optimizer.step()


def test_sparse_gradients_under_adamw_are_refused_at_construction() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 2))

    with pytest.raises(ConfigError, match=r"EmbeddingBag '0' has sparse=True.*fallback sgd"):
        NGD(model)
    NGD(model, NGDConfig(fallback=SGDFallback()))


def test_groups_that_an_engine_has_replaced_are_refused() -> None:
    """As DeepSpeed's ZeRO 1 and 2 do with their client optimizer's."""
    model = nn.Linear(4, 2)
    optimizer = NGD(model)
    flat_partition = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    optimizer.param_groups[0]["params"] = [flat_partition]
    flat_partition.grad = torch.ones_like(flat_partition)

    with pytest.raises(ConfigError, match=r"not built with.*build the engine first, and NGD on it"):
        optimizer.step()


def test_partitioned_parameters_are_refused_at_construction() -> None:
    model = nn.Linear(4, 2)
    model.weight.ds_id = 0  # what DeepSpeed's ZeRO 3 marks its parameters by

    with pytest.raises(ConfigError, match=r"'weight' by itself: DeepSpeed owns it; build the optimizer on the engine"):
        NGD(model)


class FullyShardedDataParallel(nn.Module):
    """Has the name of torch's first FSDP, by which it is known."""


def test_the_first_fsdp_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not support FullyShardedDataParallel: take fully_shard"):
        NGD(nn.Sequential(nn.Linear(4, 2), FullyShardedDataParallel()))


def fully_sharded(rank: int, world_size: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    after = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = NGD(after)
    for layer in after:
        fully_shard(layer, mesh=mesh)

    try:
        after(torch.randn(4, 4)).sum().backward()
        optimizer.step()
    except ConfigError as error:
        return str(error)
    return "nothing"


@pytest.mark.ranks
def test_parameters_that_are_sharded_later_are_refused() -> None:
    for message in run_ranks(2, fully_sharded):
        assert "no longer holds the weight" in message


def test_explain_says_what_is_where_and_at_what_rate() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(())), nn.Linear(3, 2)

    table = NGD(Two(), NGDConfig(lr=0.2, fallback=AdamWFallback(lr=0.003))).explain()

    assert "scale  a parameter of Two itself, outside its layers" in table
    assert "left to the fallback, adamw at lr 0.003:" in table
    assert "not updated" not in table


def test_a_copied_config_is_the_same() -> None:
    _, optimizer = trained()
    namespace = SimpleNamespace(optimizer=optimizer)

    assert copy.deepcopy(namespace).optimizer.config == optimizer.config

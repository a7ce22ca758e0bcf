"""Parameters without a gradient, parameters that are frozen and unfrozen, parameters that come later."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import AdamWFallback, FixedInterval, OwnerSharded
from ngd_dist.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.tensors import batch, flat
from tests.support.training import train


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.PReLU(), nn.Linear(16, 4)).double()


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_a_parameter_without_a_gradient_does_not_move(fallback: Any) -> None:
    x, y = batch()
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Sequential(nn.Linear(8, 4), nn.PReLU())}).double()
    config = {"lr": 0.1, "weight_decay": 0.1, "fallback": {"kind": fallback}}
    optimizer = NGD(model, NGDConfig.model_validate(config))
    before = flat(model["b"])

    for step in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model["a"](x) + (model["b"](x) if step < 3 else 0), y).backward()
        optimizer.step()
        if step == 2:
            assert not torch.equal(flat(model["b"]), before)
            before = flat(model["b"])

    assert torch.equal(flat(model["b"]), before)
    state = optimizer.state_dict()
    again = NGD(model, NGDConfig.model_validate(config))
    again.load_state_dict(state)
    assert again.stats.step == 8


def test_a_layer_that_is_frozen_in_mid_run_stays_and_goes_on_when_it_is_not() -> None:
    x, y = batch()
    model = mlp()
    optimizer = NGD(model, NGDConfig(lr=0.05, weight_decay=0.1))
    train(optimizer, model, x, y, 3)
    model[0].requires_grad_(False)
    before = flat(model[0])

    train(optimizer, model, x, y, 4)
    assert torch.equal(flat(model[0]), before)

    model[0].requires_grad_(True)
    train(optimizer, model, x, y, 1)
    assert not torch.equal(flat(model[0]), before)


def test_parameters_that_were_frozen_are_taken_in_once_they_are_not() -> None:
    x, y = batch()
    model = mlp()
    model[:3].requires_grad_(False)
    optimizer = NGD(model, NGDConfig(lr=0.05, staleness=FixedInterval()))
    before = flat(model[:3])
    table = optimizer.explain()
    assert "0.weight  frozen; taken in when it is unfrozen" in table
    assert [layer.name for layer in optimizer.layers] == ["4"]
    train(optimizer, model, x, y, 2)
    cache = optimizer._curvature.caches["4"]

    model[0].requires_grad_(True)
    train(optimizer, model, x, y, 1)

    assert not torch.equal(flat(model[0]), before[: flat(model[0]).numel()])
    assert [layer.name for layer in optimizer.layers] == ["0", "4"]
    assert optimizer._curvature.caches.has("0")
    assert cache is not None
    assert optimizer.stats.step == 3
    assert "2.weight  frozen" in optimizer.explain()
    model.requires_grad_(True)
    train(optimizer, model, x, y, 3)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [p.shape for p in model.parameters()]


def test_a_state_saved_after_unfreezing_fits_an_optimizer_of_all_parameters() -> None:
    x, y = batch()
    model, twin = mlp(), mlp()
    model[:3].requires_grad_(False)
    config = NGDConfig(lr=0.05, fallback=AdamWFallback(), staleness=FixedInterval(), stagger=0.0)
    optimizer = NGD(model, config)
    train(optimizer, model, x, y, 2)
    model.requires_grad_(True)
    train(optimizer, model, x, y, 2)

    twin.load_state_dict(model.state_dict())
    resumed = NGD(twin, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, x, y, 3)
    train(resumed, twin, x, y, 3)

    assert torch.equal(flat(model), flat(twin))


def test_a_group_that_is_added_trains_with_its_own_settings() -> None:
    x, y = batch()
    model = mlp()
    optimizer = NGD(model, NGDConfig(lr=0.05), param_groups=[{"params": list(model[4].parameters())}])
    train(optimizer, model, x, y, 2)
    before = flat(model[0])
    assert "0.weight  in no param group" in optimizer.explain()

    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    train(optimizer, model, x, y, 2)

    assert not torch.equal(flat(model[0]), before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.05] or [
        group["lr"] for group in optimizer.param_groups
    ] == [0.05, 0.01]
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ConfigError, match="between steps"):
        optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match=r"damping must be > 0, got -1"):
        optimizer.add_param_group({"params": list(model[2].parameters()), "damping": -1})
    assert len(optimizer.param_groups) == 2
    train(optimizer, model, x, y, 1)


def test_a_state_saved_after_unfreezing_fits_once_the_parameters_are_unfrozen() -> None:
    x, y = batch()
    model, twin = mlp(), mlp()
    optimizer = NGD(model)
    train(optimizer, model, x, y, 2)
    twin[:3].requires_grad_(False)
    resumed = NGD(twin)
    twin.requires_grad_(True)

    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert resumed.stats.step == 2


@pytest.mark.filterwarnings("ignore")
def test_lightnings_backbone_finetuning_trains_the_backbone() -> None:
    pl = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.callbacks import BackboneFinetuning
    from torch.utils.data import DataLoader, TensorDataset

    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4)

        def training_step(self, pair: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.head(self.backbone(pair[0])), pair[1])

        def configure_optimizers(self) -> Any:
            return NGD(self, NGDConfig(lr=0.05))

    x, y = batch()
    model = Classifier()
    before = flat(model.backbone)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)],
    )
    trainer.fit(model, DataLoader(TensorDataset(x.float(), y), batch_size=16))

    assert not torch.equal(flat(model.backbone), before)
    (optimizer,) = trainer.optimizers
    assert {layer.name for layer in optimizer.layers} == {"backbone.0", "head"}
    assert len(optimizer.param_groups) == 2


def on_two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    x, y = batch()
    x, y = x.chunk(world_size)[rank], y.chunk(world_size)[rank]
    config = NGDConfig(lr=0.05, weight_decay=0.1, strategy=None if world_size == 1 else OwnerSharded(replicate_below=0))
    model = mlp()
    model[:3].requires_grad_(False)
    optimizer = NGD(model, config)
    train(optimizer, model, x, y, 2)
    model.requires_grad_(True)
    train(optimizer, model, x, y, 3)

    heads = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4), "c": nn.Linear(8, 4)}).double()
    for p in heads.parameters():
        nn.init.constant_(p, 0.1)
    each = NGD(heads, config)
    unused = flat(heads["c"])
    for _ in range(3):  # b runs on rank 0 alone, c on none
        each.zero_grad()
        F.cross_entropy(heads["a"](x) + (heads["b"](x) if rank == 0 else 0), y).backward()
        each.step()
    return {"unfrozen": flat(model), "heads": flat(heads), "unused": torch.equal(flat(heads["c"]), unused)}


def ddp_unfrozen(rank: int, world_size: int) -> str:
    x, y = batch()
    model = mlp().float()
    model[:3].requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    optimizer = NGD(wrapped)
    train(optimizer, wrapped, x.float(), y, 1)
    model.requires_grad_(True)
    try:
        wrapped(x.float())
    except ConfigError as error:
        return str(error)
    return "nothing"


@pytest.mark.ranks
def test_two_ranks_take_in_what_one_does_and_leave_alone_what_no_rank_has() -> None:
    first, second = run_ranks(2, on_two_ranks)

    assert torch.equal(first["unfrozen"], second["unfrozen"])
    assert torch.equal(first["heads"], second["heads"])
    assert first["unused"]
    assert second["unused"]
    torch.testing.assert_close(first["unfrozen"], on_two_ranks(0, 1)["unfrozen"], rtol=1e-10, atol=1e-12)


@pytest.mark.ranks
def test_what_ddp_does_not_average_is_not_taken_in() -> None:
    assert all("wrap the model again" in message for message in run_ranks(2, ddp_unfrozen))

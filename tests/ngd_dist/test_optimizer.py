"""`NGD` as a torch optimizer, and what its hooks count and do not count."""

import copy
import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ngd_dist import NGD, NGDConfig
from ngd_dist.config import FixedInterval, KLClip, SGDFallback
from ngd_dist.errors import CaptureError, CheckpointError, ConfigError
from ngd_dist.statistics.statistic import Key
from tests.support.tensors import F64, weights
from tests.support.training import train


def model_and_batch(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    return model, torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))


def statistics_after(model: nn.Module, run: Any) -> dict[str, Tensor]:
    optimizer = NGD(model)
    run()
    return {str(key): value for key, value in optimizer._capture.take().items()}


def test_forward_passes_without_a_backward_count_for_nothing() -> None:
    model, x, y = model_and_batch()

    def plainly() -> None:
        F.cross_entropy(model(x), y).backward()

    def with_others() -> None:
        with torch.no_grad():
            model(10 * x)
        model(20 * x)  # differentiable, but never differentiated
        plainly()

    expected, found = statistics_after(model, plainly), statistics_after(copy.deepcopy(model), lambda: None)
    assert found == {}
    found = statistics_after(model, with_others)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_copy_of_the_model_is_not_watched() -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model)

    F.cross_entropy(copy.deepcopy(model)(x), y).backward()

    assert optimizer._capture.take() == {}


def test_hooks_go_with_the_optimizer() -> None:
    model, *_ = model_and_batch()
    optimizer = NGD(model)
    assert model[0]._forward_hooks

    del optimizer
    gc.collect()

    assert not model[0]._forward_hooks


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    model, x, y = model_and_batch()
    x.requires_grad_()

    expected = statistics_after(model, lambda: F.cross_entropy(model(x), y).backward())
    found = statistics_after(
        model, lambda: F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y).backward()
    )

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)


def test_more_micro_batches_than_were_said_are_an_error_that_names_the_layer() -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model, NGDConfig(micro_batches=2))
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()

    with pytest.raises(CaptureError, match=r"layer '0' was differentiated 3 times.*micro_batches is 2"):
        optimizer.step()


def test_what_is_not_covered_takes_the_plain_step_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8, bias=False)
    twin = nn.Linear(8, 8, bias=False)
    twin.weight = shared.weight
    frozen = nn.Linear(8, 8)
    frozen.weight.requires_grad_(False)
    gone = nn.Linear(8, 8).requires_grad_(False)
    norm = nn.InstanceNorm2d(4, affine=True)
    model = nn.Sequential(norm, nn.Flatten(), shared, twin, frozen, gone, nn.PReLU(), nn.Linear(8, 3)).double()
    optimizer = NGD(model, NGDConfig(lr=0.5, momentum=0.0, fallback=SGDFallback()))

    assert optimizer.plain_parameters == {
        "0.weight": "no layer kind covers InstanceNorm2d",
        "0.bias": "no layer kind covers InstanceNorm2d",
        "2.weight": "Linear shares a parameter with another module",
        "3.weight": "Linear shares a parameter with another module",
        "4.bias": "Linear is partly frozen, or partly outside param_groups",
        "6.weight": "no layer kind covers PReLU",
    }
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0.weight (no layer kind covers InstanceNorm2d)" in caplog.text
    assert [layer.name for layer in optimizer.layers] == ["7"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(torch.randn(5, 4, 2, 1, dtype=F64)), torch.randint(3, (5,))).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    optimizer.step()

    for name, p in model.named_parameters():
        if name in optimizer.plain_parameters:
            torch.testing.assert_close(p.detach(), before[name] - 0.5 * gradients[name])
    assert torch.equal(gone.weight, before["5.weight"])


def test_state_survives_saving_to_a_file_bit_for_bit(tmp_path: Any) -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model, NGDConfig(ema_decay=0.9))
    train(optimizer, model, x, y, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(optimizer, model, x, y, 3)
    twin, *_ = model_and_batch(seed=1)
    other = NGD(twin, NGDConfig(ema_decay=0.9))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(other, twin, x, y, 3)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert other.stats.ages == optimizer.stats.ages
    assert other.stats.step == 8


def test_a_state_of_another_model_or_optimizer_is_refused() -> None:
    model, *_ = model_and_batch()
    optimizer = NGD(model)
    other = NGD(nn.Sequential(nn.Linear(4, 6)))

    with pytest.raises(CheckpointError, match=r"missing \['0.A', '0.G', '2.A', '2.G'\]|unknown \['2.A', '2.G'\]"):
        other.load_state_dict(optimizer.state_dict())
    wider = NGD(nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double())
    before = copy.deepcopy(wider.state_dict())
    trained, x, y = model_and_batch()
    donor = NGD(trained)
    train(donor, trained, x, y, 1)
    with pytest.raises(CheckpointError, match=r"0\.G must have 28 numbers, got 21"):
        wider.load_state_dict(donor.state_dict())
    assert str(wider.state_dict()) == str(before)
    with pytest.raises(CheckpointError, match="has the key 'ngd'"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_torchs_schedulers_drive_lr_and_damping_is_a_group_setting() -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model, NGDConfig(lr=0.1, damping=1e-3))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    train(optimizer, model, x, y, 1)
    scheduler.step()

    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert optimizer.param_groups[0]["damping"] == 1e-3


def test_a_closure_is_evaluated_once_and_its_loss_returned() -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model)
    losses = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    assert optimizer.step(closure) == losses[0]
    assert len(losses) == 1


def test_param_groups_have_their_own_settings() -> None:
    model, x, y = model_and_batch()
    first, second = model[0], model[2]
    groups = [{"params": first.parameters(), "lr": 0.0}, {"params": second.parameters(), "weight_decay": 0.1}]
    optimizer = NGD(model, NGDConfig(lr=0.2), param_groups=groups)
    before = first.weight.detach().clone()

    train(optimizer, model, x, y, 2)

    assert torch.equal(first.weight, before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.2]


@pytest.mark.parametrize("replaces", ["list of copies", "load_state_dict"])
def test_groups_that_take_the_place_of_others_count(replaces: str) -> None:
    trained = []
    for is_replaced in (False, True):
        model, x, y = model_and_batch()
        optimizer = NGD(model, NGDConfig(damping=0.1, staleness=FixedInterval(), clip=KLClip(max_kl=1e-4)))
        train(optimizer, model, x, y, 1)
        if is_replaced and replaces == "list of copies":
            optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        elif is_replaced:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0] |= {"damping": 5.0, "lr": 0.3}
        train(optimizer, model, x, y, 2)
        trained.append(weights(model))

    for kept, replaced in zip(*trained, strict=True):
        assert torch.equal(kept, replaced)


def test_momentum_and_decay_are_those_of_sgd_on_plain_parameters() -> None:
    ours, theirs = (nn.PReLU(3, init=0.3).double() for _ in range(2))
    decay, lr = 0.1, 0.2
    optimizer = NGD(ours, NGDConfig(lr=lr, momentum=0.9, weight_decay=decay, fallback=SGDFallback()))
    sgd = torch.optim.SGD(theirs.parameters(), lr=lr, momentum=0.9)

    for step in range(4):
        x = torch.linspace(-2, 1, 6, dtype=F64).view(2, 3) * (step + 1)
        for model, method in ((ours, optimizer), (theirs, sgd)):
            method.zero_grad()
            model(x).square().sum().backward()
        with torch.no_grad():
            theirs.weight *= 1 - lr * decay
        optimizer.step()
        sgd.step()

        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-14, atol=0)


def test_parameters_outside_the_groups_are_left_alone() -> None:
    model, x, y = model_and_batch()
    frozen = [p.detach().clone() for p in model[0].parameters()]
    optimizer = NGD(model, param_groups=[{"params": list(model[2].parameters())}])

    train(optimizer, model, x, y, 2)

    assert [layer.name for layer in optimizer.layers] == ["2"]
    assert all(torch.equal(a, b) for a, b in zip(model[0].parameters(), frozen, strict=True))
    assert "0.weight  in no param group" in optimizer.explain()


def test_a_parameter_that_is_not_the_models_takes_the_plain_step() -> None:
    model, x, y = model_and_batch()
    scale = nn.Parameter(torch.ones((), dtype=F64))
    config = NGDConfig(lr=0.5, momentum=0.0, fallback=SGDFallback())
    optimizer = NGD(model, config, param_groups=[{"params": [*model.parameters(), scale]}])

    F.cross_entropy(scale * model(x), y).backward()
    gradient = scale.grad.clone() if scale.grad is not None else None
    optimizer.step()

    assert optimizer.plain_parameters == {"1 in param_groups": "not a parameter of the model"}
    assert gradient is not None
    torch.testing.assert_close(scale.detach(), 1 - 0.5 * gradient)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_reparametrised_layer_takes_the_plain_step() -> None:
    optimizer = NGD(nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2))))

    assert set(optimizer.plain_parameters) == {"0.bias", "0.weight_g", "0.weight_v"}


def test_a_layer_whose_weights_are_used_past_its_module_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model)

    for _ in range(3):
        optimizer.zero_grad()
        hidden = F.relu(F.linear(x, model[0].weight, model[0].bias))
        F.cross_entropy(model[2](hidden), y).backward()
        optimizer.step()

    assert [record.getMessage() for record in caplog.records] == [
        "layer '0' takes a plain gradient step: its weights are used without its module"
    ]


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"use DistributedDataParallel"):
        NGD(nn.DataParallel(nn.Linear(2, 2)))


def test_a_grad_scaler_that_it_does_not_know_is_refused() -> None:
    model, x, y = model_and_batch()
    model.float()
    optimizer = NGD(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(F.cross_entropy(model(x.float()), y)).backward()

    with pytest.raises(ConfigError, match="grad_scaler=scaler"):
        scaler.step(optimizer)


def test_statistics_are_formed_in_full_precision_under_autocast() -> None:
    model, x, y = model_and_batch()
    model.float()
    optimizer = NGD(model)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(model(x.float()), y).backward()
        A = optimizer._capture.take()[Key("0", "A")]

    rows = torch.cat([x, torch.ones(8, 1, dtype=F64)], dim=1).to(torch.bfloat16).double()
    assert A.dtype == torch.float32
    torch.testing.assert_close(A[0].double(), rows.T @ rows / 8, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"damping": 0.0}, "damping must be > 0, got 0.0"),
        ({"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1.0"),
    ],
)
def test_a_bad_group_is_refused_with_value_and_bound(settings: dict[str, float], message: str) -> None:
    model, *_ = model_and_batch()

    with pytest.raises(ConfigError, match=message):
        NGD(model, param_groups=[{"params": list(model.parameters()), **settings}])


def test_a_factor_that_cannot_be_inverted_keeps_its_old_inverse_and_is_counted() -> None:
    digits = load_digits()
    x = torch.tensor(digits.data[:256] / 16, dtype=torch.float32)  # some pixels are always 0: A is singular
    y = torch.tensor(digits.target[:256])
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = NGD(model, NGDConfig(damping=0.1, staleness=FixedInterval(steps=1)))
    train(optimizer, model, x, y, 1)
    old = {name: value.clone() for name, value in (optimizer._curvature.caches[""] or {}).items()}
    optimizer.param_groups[0]["damping"] = 1e-30

    train(optimizer, model, x, y, 1)

    # G of a softmax is singular: its columns sum to 0. A's empty pixels stand alone on its diagonal and do no harm.
    endings = {refresh.statistic: refresh.ending for refresh in optimizer.stats.refreshes}
    assert endings[".A"] == "OK"
    assert endings[".G"] in ("NOT_POSITIVE_DEFINITE", "INACCURATE")  # rounding decides which
    assert optimizer.stats.failed_inversions == 1
    assert torch.equal((optimizer._curvature.caches[""] or {})["G"], old["G"])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_statistic_that_is_not_finite_never_enters_the_average() -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model, NGDConfig(ema_decay=0.9, staleness=FixedInterval(steps=1)))
    train(optimizer, model, x, y, 2)
    # The gradients are finite, the norm of the statistic is not: (1e100)^4 overflows.
    train(optimizer, model, x * 1e100, y, 1)

    assert optimizer.stats.failed_inversions > 0
    assert all(bool(torch.isfinite(s.value).all()) for s in optimizer._curvature.statistics.values())


def test_a_layer_without_statistics_takes_a_plain_step() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    optimizer = NGD(model)
    unused = model["unused"].weight.detach().clone()

    for _ in range(3):
        optimizer.zero_grad()
        model["used"](torch.randn(4, 3)).square().sum(1).mean().backward()
        optimizer.step()

    assert torch.equal(model["unused"].weight, unused)
    assert optimizer.stats.failed_inversions == 0


def test_ages_count_the_steps_since_the_measurement() -> None:
    model, x, y = model_and_batch()
    optimizer = NGD(model, NGDConfig(staleness=FixedInterval(steps=3), stagger=0.0))
    ages = []
    for _ in range(5):
        train(optimizer, model, x, y, 1)
        ages.append(optimizer.stats.ages[0])

    assert ages == [0, 1, 2, 0, 1]
    assert optimizer.statistic_names == ["0.A", "0.G", "2.A", "2.G"]
    assert set(optimizer.stats.seconds) >= {"reduce", "refresh", "apply", "publish", "update"}


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        NGD(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"damping": 0}, "damping"), ({"momentum": 1}, "momentum"), ({"dampening": 0.1}, "dampening")],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, float], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        NGDConfig.model_validate(settings)


def test_the_configuration_imports_without_torch() -> None:
    code = "import sys, ngd_dist, ngd_dist.config, ngd_dist.factors.cost; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_intervals_grow_past_one() -> None:
    """The digits recipe's statistics settle: later refreshes become rarer, and the net learns meanwhile."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.1))

    losses = train(optimizer, model, x[:512], y[:512], 12)

    assert max(optimizer.stats.intervals) > 3
    assert losses[-1] < 0.2 * losses[0]


def test_an_exclude_names_a_module_with_all_inside_it_or_a_layer() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    everything = {
        f"{name}.{key}" for name, m in encoder.named_modules() for key, _ in m.named_parameters(recurse=False)
    }

    inner = NGD(encoder, NGDConfig(exclude=("self_attn.in_proj",))).plain_parameters
    outer = NGD(nn.ModuleDict({"layer": encoder}), NGDConfig(exclude=("lay*",))).plain_parameters

    attention = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert set(inner) == {f"self_attn.{name}" for name in attention}
    assert set(outer) == {f"layer.{name}" for name in everything}
    assert set(outer.values()) == {"excluded"}
    with pytest.raises(ConfigError, match="exclude names no module or layer: 'head'"):
        NGD(encoder, NGDConfig(exclude=("head",)))


def test_parameters_in_place_of_the_model_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="NGD takes the model itself, got generator; parameters go into param_groups"):
        NGD(nn.Linear(2, 2).parameters())  # type: ignore[arg-type]


def test_settings_may_be_a_mapping_and_are_checked_alike() -> None:
    assert NGD(nn.Linear(2, 2), {"lr": 0.3}).config == NGDConfig(lr=0.3)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="learning_rate"):
        NGD(nn.Linear(2, 2), {"learning_rate": 0.3})  # type: ignore[arg-type]

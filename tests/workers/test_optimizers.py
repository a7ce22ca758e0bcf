"""The optimizers that a job's is compared with: their formulas, the rule of Muon, lr by group, and what is refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ngd_workers.contract.rundir import Outcome
from ngd_workers.contract.spec import (
    GPT,
    LAMB,
    LARS,
    JobSpec,
    Muon,
    OptimizerChoice,
    Plain,
    Shampoo,
    SmallCNN,
    Timm,
    Torchvision,
    Transformers,
)
from ngd_workers.data import Images, TokenSequences
from ngd_workers.launch.attempt import run_rank
from ngd_workers.models import build_model
from ngd_workers.train.baselines import build
from ngd_workers.train.hidden_matrices import hidden_matrices
from ngd_workers.train.optimizers import BUILDERS
from tests.support.attempts import make_attempt, small_spec
from tests.support.optimizers import DEEP, OPTIMIZERS
from tests.support.training import weights_at

KINDS = [choice.model_fields["kind"].default for choice in get_args(get_args(OptimizerChoice)[0])]
SHARDING = {"fsdp": {"kind": "fsdp"}, "zero 1": {"kind": "deepspeed", "stage": 1}}
WHOLE = [kind for kind in KINDS if kind != "ngd" and small_spec(optimizer={"kind": kind}).optimizer.reads_whole]
RGB = Images(channels=3, height=32, width=32, classes=7)


def run(folder: Path, spec: JobSpec) -> Outcome:
    return run_rank(make_attempt(folder, spec))


def sparse(shape: Any) -> nn.Module:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(2, 10, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.bag((x.flatten(1) > 0).long())

    return Bag()


def test_each_kind_has_a_builder_and_a_case() -> None:
    assert set(BUILDERS) == set(OPTIMIZERS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_is_a_choice(kind: str) -> None:
    assert small_spec(optimizer={"kind": kind}).optimizer.kind == kind


# --- formulas ---------------------------------------------------------------------------------------------------------


def after_steps(choice: Plain, gradients: list[Tensor], first: Tensor) -> Tensor:
    """Returns the weight of a layer after steps with these gradients."""
    layer = nn.Linear(first.shape[1], first.shape[0], bias=False, dtype=first.dtype)
    layer.weight.data.copy_(first)
    optimizer = build(layer, choice)
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
    return layer.weight.detach()


def drawn(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_lars_is_its_paper_s_algorithm() -> None:
    w, *gradients = drawn(4)
    choice = LARS(lr=0.7, momentum=0.8, weight_decay=0.02, trust_coefficient=0.3)
    expected, velocity = w.clone(), torch.zeros_like(w)

    for g in gradients:
        rate = 0.3 * expected.norm() / (g.norm() + 0.02 * expected.norm())
        velocity = 0.8 * velocity + rate * (g + 0.02 * expected)
        expected = expected - 0.7 * velocity

    torch.testing.assert_close(after_steps(choice, gradients, w), expected, rtol=1e-12, atol=0)


def test_lamb_is_its_paper_s_algorithm() -> None:
    w, *gradients = drawn(4)
    choice = LAMB(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.2)
    expected, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)

    for step, g in enumerate(gradients, 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        update = m / (v.sqrt() + 1e-3) + 0.2 * expected
        ratio = expected.norm() / (update.norm() + 1e-3)
        expected = expected - 0.1 / (1 - 0.8**step) * ratio * update  # the library corrects the bias of m alone

    torch.testing.assert_close(after_steps(choice, gradients, w), expected, rtol=1e-12, atol=0)


def test_shampoo_is_its_paper_s_algorithm_with_the_length_of_sgd() -> None:
    w, *gradients = drawn(6)
    choice = Shampoo(
        lr=0.1, beta1=0.0, beta2=0.9, nesterov=False, matrix_eps=1e-8, start_preconditioning_step=1, block_size=8
    )
    left, right = (1e-8 * torch.eye(n, dtype=w.dtype) for n in w.shape)
    expected = w.clone()

    for g in gradients:
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        direction = root(left) @ g @ root(right)
        expected = expected - 0.1 * direction * g.norm() / direction.norm()

    # The library ends its iteration at an error of 1e-3.
    torch.testing.assert_close(after_steps(choice, gradients, w), expected, rtol=0, atol=2e-2 * float(w.norm()) * 0.1)


def root(statistic: Tensor) -> Tensor:
    """Returns the inverse fourth root, with the library's damping."""
    values, vectors = torch.linalg.eigh(statistic)
    return (vectors * (values + 1e-8 * values.max()) ** -0.25) @ vectors.T


def test_muon_makes_the_step_of_a_kernel_orthogonal() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = build(model, Muon(lr=0.1))
    before = model[1].weight.detach().clone()

    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()

    step = (before - model[1].weight).detach().reshape(8, 36) / 0.1
    lengths = torch.linalg.svdvals(step)
    assert 0.6 < lengths.min() < lengths.max() < 1.3  # where Jordan's coefficients leave them


# --- the rule of Muon -------------------------------------------------------------------------------------------------


def hidden_names(model: nn.Module) -> set[str]:
    hidden = {id(matrix) for matrix in hidden_matrices(model)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in hidden}


TINY = {"img_size": 32, "depth": 1}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}
TEXT = TokenSequences(vocabulary=20, length=8)
MODELS = [
    pytest.param(SmallCNN(channels=4, hidden=8), Images(1, 8, 8, 10), "block1.", id="cnn"),
    pytest.param(GPT(width=16, layers=1, heads=2), TEXT, "embedding.", id="gpt"),
    pytest.param(Torchvision(name="resnet18"), RGB, "conv1.", id="resnet18"),
    pytest.param(Timm(name="vit_tiny_patch16_224", options=TINY), RGB, "patch_embed.", id="timm-vit"),
    pytest.param(Transformers(name="ViTForImageClassification", options=SMALL), RGB, "vit.embeddings.", id="vit"),
]


@pytest.mark.parametrize(("choice", "shape", "outer"), MODELS)
def test_hidden_matrices_are_those_between_the_first_and_the_last_weight(choice: Any, shape: Any, outer: str) -> None:
    model = build_model(choice, shape)
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)]

    assert hidden_names(model) == {name for name in weights[:-1] if not name.startswith(outer)}


def test_a_head_that_shares_the_embedding_is_no_hidden_matrix() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    model[3].weight = model[0].weight

    assert hidden_names(model) == {"1.weight", "2.weight"}


def test_positions_and_gains_are_no_hidden_matrices() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.Linear(4, 2))
    model.positions = nn.Parameter(torch.zeros(8, 4))

    assert hidden_names(model) == {"1.in_proj_weight", "1.out_proj.weight"}


# --- in a job ---------------------------------------------------------------------------------------------------------


def test_the_schedule_moves_each_group_by_its_own_rate(tmp_path: Path) -> None:
    optimizer = {"kind": "muon", "lr": 0.02, "adamw_lr": 0.005}
    schedule = {"steps": 3, "warmup_steps": 4}

    run(tmp_path, small_spec(model=DEEP, optimizer=optimizer, schedule=schedule, checkpoint={"every_steps": 1}))

    rates = [[group["lr"] for group in state_at(tmp_path, step)["param_groups"]] for step in (2, 3)]
    assert rates == [[0.01, pytest.approx(0.0025)], [pytest.approx(0.015), pytest.approx(0.00375)]]


def state_at(folder: Path, step: int) -> Any:
    file = folder / "checkpoints" / f"step-{step:08}" / "state.pt"
    return torch.load(file, weights_only=True)["optimizer"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lars", {"trust_coefficient": 0.01}),
        ("soap", {"precondition_frequency": 2}),
        *(
            pytest.param(kind, changes, marks=pytest.mark.slow)
            for kind, changes in [
                ("muon", {"adamw_lr": 0.01}),
                ("muon", {"ns_steps": 2}),
                ("soap", {"beta2": 0.5}),
                ("shampoo", {"beta2": 0.5}),
                ("shampoo", {"matrix_eps": 0.1}),
            ]
        ),
    ],
)
def test_a_fork_s_own_settings_count(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    steps = {"model": DEEP, "schedule": {"steps": 6}}
    run(tmp_path / "first", small_spec(optimizer=OPTIMIZERS[kind], model=DEEP, schedule={"steps": 2}))
    goes_on = {"init_from": {"kind": "checkpoint", "run_dir": "first", "takes": "everything"}}

    for name, more in (("same", {}), ("changed", changes)):
        outcome = run(tmp_path / name, small_spec(optimizer=OPTIMIZERS[kind] | more, **steps, **goes_on))
        assert outcome.result == "succeeded", outcome.message

    same, changed = weights_at(tmp_path / "same", 6), weights_at(tmp_path / "changed", 6)
    assert not all(torch.equal(same[name], changed[name]) for name in same)


@pytest.mark.parametrize(("kind", "setting"), [("soap", "max_precondition_dim"), ("shampoo", "block_size")])
def test_a_fork_can_t_change_the_shapes_of_the_state(tmp_path: Path, kind: str, setting: str) -> None:
    run(tmp_path / "first", small_spec(optimizer={"kind": kind}, schedule={"steps": 2}))
    goes_on = {"init_from": {"kind": "checkpoint", "run_dir": "first", "takes": "everything"}}

    outcome = run(tmp_path / "second", small_spec(optimizer={"kind": kind, setting: 7}, **goes_on))

    assert (outcome.result, outcome.reason) == ("failed", "InvalidSpec")
    assert f"has the shapes of {setting}" in (outcome.message or "")


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("muon", {"kind": "mlp", "hidden": [32]}, "has no hidden matrix to train"),
        (
            "lamb",
            {"kind": "function", "function": "tests.workers.test_optimizers:sparse"},
            "layer bag makes sparse gradients; build it with sparse=False",
        ),
    ],
)
def test_a_model_that_it_can_t_train_is_refused(tmp_path: Path, kind: str, model: Any, message: str) -> None:
    outcome = run(tmp_path, small_spec(optimizer={"kind": kind}, model=model))

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", "InvalidSpec", False)
    assert message in (outcome.message or "")


def test_scalars_are_trained_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
            self.scale = nn.Parameter(torch.tensor(2.0))

    for kind in WHOLE:
        model = Scaled()
        optimizer = build(model, small_spec(optimizer=OPTIMIZERS[kind]).optimizer)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert model.scale.item() < 2.0, kind


@pytest.mark.parametrize(
    ("kind", "engine"),
    [(kind, engine) for kind in WHOLE for engine in SHARDING if (kind, engine) != ("muon", "fsdp")],
)
def test_parts_of_weights_are_refused_when_the_job_is_posted(kind: str, engine: str) -> None:
    with pytest.raises(ValidationError, match=f"{kind} .* leaves each worker a part of them: take engine ddp"):
        small_spec(optimizer={"kind": kind}, engine=SHARDING[engine], resources={"workers": 2})


def test_shampoo_draws_none_of_the_job_s_random_numbers() -> None:
    model = nn.Linear(8, 8)
    optimizer = build(model, Shampoo())
    model(torch.randn(4, 8)).square().sum().backward()
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    optimizer.step()

    assert torch.equal(torch.rand(3), expected)

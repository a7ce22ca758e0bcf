"""Every choice that a job's optimizer may make reaches the optimizer, and what it does is told."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.autograd.graph import saved_tensors_hooks

from ngd_dist.distributed.comm import Communicator
from ngd_workers.contract.events import StepRecord
from ngd_workers.contract.spec import JobSpec
from ngd_workers.data import Images
from ngd_workers.data.tensors import image_tensors
from ngd_workers.launch.attempt import run_rank
from ngd_workers.tasks import build_task
from ngd_workers.train.learner import Learner
from ngd_workers.train.loading import MicroBatch
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.training import weights_at

CNN = {"kind": "small_cnn", "channels": 4, "hidden": 16}
GIVEN = {"kind": "ngd", "lr": 0.03, "damping": 0.03}
MONTE_CARLO = {"fisher": {"kind": "monte_carlo"}}
LEVENBERG_MARQUARDT = {"damping_rule": {"kind": "levenberg_marquardt", "decay": 0.9, "every": 2}}
ADAPTIVE = {"kind": "ngd", "damping": 1.0, "step_length": {"kind": "quadratic_model"}} | LEVENBERG_MARQUARDT
CHOICES = {
    "monte_carlo": GIVEN | MONTE_CARLO,
    "exact": GIVEN | {"fisher": {"kind": "exact"}},
    "adaptive": ADAPTIVE,
    "adaptive monte_carlo": ADAPTIVE | MONTE_CARLO,
    "adaptive on parts": ADAPTIVE | MONTE_CARLO | {"statistics_fraction": 0.25, "objective_fraction": 0.25},
    "ekfac": GIVEN | {"preconditioner": {"kind": "ekfac"}},
    "lngd": {"kind": "ngd", "lr": 0.06, "momentum": 0.5, "preconditioner": {"kind": "lngd"}},
    "tkfac": GIVEN | {"preconditioner": {"kind": "tkfac"}},
    "eva": GIVEN | {"preconditioner": {"kind": "eva"}, "clip": {"kind": "kl", "max_kl": 0.001}},
    "singd": GIVEN | {"preconditioner": {"kind": "singd", "structure": "low_rank"}},
    "exact damping": GIVEN | {"preconditioner": {"kind": "kfac", "damping_form": "exact"}},
    "paper's update": GIVEN | {"momentum_mode": "proportional", "weight_rescaling": "shrink", "clip": {"kind": "kl"}},
    "fallback": GIVEN | {"exclude": ("output",), "fallback": {"kind": "adamw"}},
}


def run(tmp_path, **changes) -> list[StepRecord]:
    attempt = make_attempt(tmp_path, small_spec(**changes))
    outcome = run_rank(attempt)
    assert outcome.result == "succeeded", outcome.message
    return records(spooled(attempt))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_learns(tmp_path, choice):
    steps = run(tmp_path, model=CNN, optimizer=CHOICES[choice], schedule={"steps": 12})

    assert steps[-1].metrics["loss"] < 0.8 * steps[0].metrics["loss"]


def test_a_fisher_of_the_model_s_own_is_not_that_of_the_labels(tmp_path):
    curves = {
        kind: [step.metrics["loss"] for step in run(tmp_path / kind, optimizer=GIVEN | {"fisher": {"kind": kind}})]
        for kind in ("empirical", "monte_carlo", "exact")
    }

    assert curves["empirical"] != curves["exact"] != curves["monte_carlo"] != curves["empirical"]


def test_what_was_adapted_is_recorded(tmp_path):
    first, second, third, fourth, *_ = run(tmp_path, optimizer=ADAPTIVE)

    assert len({step.lr for step in (first, second, third, fourth)}) == 4
    assert (first.momentum, second.momentum != 0) == (0, True)  # there is no last step at the first
    assert first.damping == 1.0
    assert second.damping in (1 / 0.81, 1.0, 0.81)  # decay ** every
    assert [step.reduction_ratio is not None for step in (first, second, third, fourth)] == [False, True, False, True]


def test_what_was_given_stays_as_it_was_given(tmp_path):
    schedule = {"steps": 4, "warmup_steps": 2}

    steps = run(tmp_path, optimizer=GIVEN | LEVENBERG_MARQUARDT, schedule=schedule)

    assert [step.lr for step in steps] == [0.015, 0.03, 0.03, 0.03]
    assert {step.momentum for step in steps} == {None}
    assert [step.reduction_ratio is not None for step in steps] == [False, True, False, True]


def test_damping_is_recorded_for_ngd_alone(tmp_path):
    rule = {"kind": "exponential", "factor": 0.5}

    ngd = run(tmp_path / "ngd", optimizer=GIVEN | {"damping": 0.5, "damping_rule": rule}, schedule={"steps": 2})
    sgd = run(tmp_path / "sgd", schedule={"steps": 2})

    assert [step.damping for step in ngd] == [0.25, 0.125]
    assert [step.damping for step in sgd] == [None, None]


def test_burn_in_leaves_the_weights_alone(tmp_path):
    attempt = make_attempt(
        tmp_path, small_spec(optimizer=GIVEN | {"burn_in": 4}, checkpoint={"keep": 9, "every_steps": 2})
    )

    run_rank(attempt)

    two, four, six = (weights_at(tmp_path, step) for step in (2, 4, 6))
    assert all(torch.equal(two[name], four[name]) for name in two)
    assert not any(torch.equal(four[name], six[name]) for name in two)


@pytest.mark.parametrize("changes", [{}, {"batch": {"global_size": 64, "micro_size": 16}}], ids=["whole", "cut"])
def test_resumed_run_adapts_to_the_bits_of_an_uninterrupted_one(tmp_path, changes):
    spec = small_spec(model=CNN, optimizer=ADAPTIVE | MONTE_CARLO, checkpoint={"every_steps": 3}, **changes)
    run_rank(make_attempt(tmp_path / "whole", spec))
    run_rank(make_attempt(tmp_path / "cut", spec))
    (tmp_path / "cut" / "checkpoints" / "step-00000008" / "state.pt").write_bytes(b"lost")

    resumed = make_attempt(tmp_path / "cut", spec, number=2)
    run_rank(resumed)

    assert spooled(resumed)[0].resumed_step == 6
    whole, cut = weights_at(tmp_path / "whole", 8), weights_at(tmp_path / "cut", 8)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


# --- the objective ----------------------------------------------------------------------------------------------------


def learner(micro_size: int | None = None, model: torch.nn.Module | None = None, **optimizer: object) -> Learner:
    torch.manual_seed(0)
    batch = {"global_size": 64} | ({} if micro_size is None else {"micro_size": micro_size})
    spec = small_spec(optimizer=ADAPTIVE | optimizer, batch=batch)
    x, y = whole()
    data = image_tensors(x.view(64, 1, 8, 8), y, x.view(64, 1, 8, 8), y, Images(1, 8, 8, 10))
    task = build_task(spec.task, data.shape)
    return Learner(model or torch.nn.Linear(64, 10), task, data, spec, Communicator(), torch.device("cpu"))


def whole() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(64, 64, generator=generator), torch.randint(10, (64,), generator=generator)


def samples(micro_size: int = 64) -> list[MicroBatch]:
    x, y = whole()
    return [
        MicroBatch(part, len(part[0]), skipped=0, counts=True)
        for part in zip(x.split(micro_size), y.split(micro_size), strict=True)
    ]


def objective(cut: Learner, micro_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [micro_batch.content for micro_batch in samples(micro_size)]
    return cut.objective(batches, [1 / len(batches)] * len(batches))


@pytest.mark.parametrize("micro_size", [64, 16])
def test_objective_is_the_loss_that_was_differentiated(micro_size):
    model = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))
    cut = learner(micro_size, model)

    loss, logits = objective(cut, micro_size)
    gradient = torch.autograd.grad(loss, model[0].weight)[0]
    totals = cut.backward(samples(micro_size))

    assert logits.numel() == 64 * 10
    assert loss.item() == pytest.approx(totals.metrics(cut.task)["loss"], rel=1e-6)
    assert torch.allclose(gradient, model[0].weight.grad, rtol=1e-4, atol=1e-7)  # float32 sums in another order


def test_the_schedule_leaves_an_lr_alone_that_steps_choose():
    chosen, given = learner(burn_in=1), learner(burn_in=1, step_length={"kind": "given"})

    for one in (chosen, given):  # a step of the burn-in chooses nothing yet
        one.backward(samples())
        one.update(samples(), lr=0.25)

    assert [one.optimizer.param_groups[0]["lr"] for one in (chosen, given)] == [0.1, 0.25]


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_steps_do_not_depend_on_how_the_batch_is_cut(fraction):
    weights = []
    for micro_size in (64, 16):
        cut = learner(micro_size, statistics_fraction=fraction, objective_fraction=fraction)
        for _ in range(3):
            cut.backward(samples(micro_size))
            cut.update(samples(micro_size), lr=0.0)
        weights.append(cut.model.weight)

    # float32 sums in another order, through an inversion and a 2x2 solve
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-5)


def test_the_objective_is_of_a_part_of_each_micro_batch():
    cut = learner(16, objective_fraction=0.25)
    given = []
    cut.optimizer.step = lambda objective: given.append(objective())

    cut.backward(samples(16))
    cut.update(samples(16), lr=0.0)

    x, y = whole()
    ((loss, logits),) = given
    assert loss.item() == pytest.approx(F.cross_entropy(cut.model(x[::4]), y[::4]).item(), rel=1e-6)
    assert logits.numel() == 16 * 10


def test_parts_weigh_as_much_as_their_own_terms():
    cut = learner(16, objective_fraction=0.25)
    cut.task.counts_vary = True
    cut.task.count = lambda batch: batch[1].sum()

    parts, weights = cut._objective_parts(samples(16))

    terms = whole()[1][::4].view(4, 4).sum(1)
    assert [len(part.content[1]) for part in parts] == [4] * 4
    assert torch.stack(weights).tolist() == pytest.approx((terms / terms.sum()).tolist())


def test_a_part_for_an_objective_that_nothing_evaluates_is_refused():
    with pytest.raises(ValidationError, match=r"objective_fraction 0\.25 is read by step_length quadratic_model"):
        small_spec(optimizer=GIVEN | {"objective_fraction": 0.25})


def held_by_the_objective(micro_size: int) -> int:
    """Returns how many numbers a deep model's objective keeps for a backward pass."""
    hidden = [layer for _ in range(8) for layer in (torch.nn.Linear(64, 64), torch.nn.Tanh())]
    deep = learner(micro_size, torch.nn.Sequential(*hidden, torch.nn.Linear(64, 10)))
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(deep, micro_size)
    return sum(sizes)


def test_objective_holds_the_activations_of_one_micro_batch_at_most():
    whole, cut = (held_by_the_objective(micro_size) for micro_size in (64, 16))

    assert cut < whole / 4


# --- what is not finite -----------------------------------------------------------------------------------------------


def infinite_gradient(shape):
    """Returns a model whose logits are finite and whose gradients are not."""

    class Rooted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(64, shape.classes)

        def forward(self, x):
            logits = self.head(x.flatten(1))
            return logits + (logits * 0).abs().sqrt()  # the root's derivative at 0 is infinite

    return Rooted()


def infinite(**optimizer) -> JobSpec:
    model = {"kind": "function", "function": "tests.workers.test_ngd_choices:infinite_gradient"}
    return small_spec(model=model, optimizer=GIVEN | optimizer)


def test_a_gradient_that_is_not_finite_ends_the_job_as_such_a_loss_does(tmp_path):
    outcome = run_rank(make_attempt(tmp_path, infinite()))

    assert (outcome.result, outcome.reason, outcome.retryable) == ("failed", "NonFiniteLoss", False)
    assert "the gradient of 'head.weight' is NaN or infinite on rank 0 of 1 in step 1" in outcome.message


def test_skipped_steps_are_counted_and_change_nothing(tmp_path):
    attempt = make_attempt(tmp_path, infinite(non_finite="skip"))

    outcome = run_rank(attempt)

    assert outcome.result == "succeeded"
    assert [step.skipped_steps for step in records(spooled(attempt))] == list(range(1, 9))
    assert all(torch.equal(weights_at(tmp_path, 6)[name], value) for name, value in weights_at(tmp_path, 8).items())


def nan_for_some(shape):
    """Returns a model whose logits are NaN in every third training step."""

    class Faulty(torch.nn.Linear):
        calls = 0

        def forward(self, x):
            logits = super().forward(x.flatten(1))
            self.calls += self.training
            return logits * float("nan") if self.training and self.calls % 3 == 0 else logits

    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), Faulty(64, shape.classes))


def test_a_job_that_skips_goes_on_after_a_loss_that_is_not_finite(tmp_path):
    model = {"kind": "function", "function": "tests.workers.test_ngd_choices:nan_for_some"}

    steps = run(tmp_path, model=model, optimizer=GIVEN | {"non_finite": "skip"})

    assert [step.skipped_steps for step in steps] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert steps[-1].metrics["loss"] < steps[0].metrics["loss"]


def test_a_model_with_too_many_outputs_for_the_exact_fisher_is_told_so(tmp_path):
    attempt = make_attempt(tmp_path, small_spec(optimizer=GIVEN | {"fisher": {"kind": "exact", "max_outputs": 9}}))

    outcome = run_rank(attempt)

    assert (outcome.result, outcome.reason) == ("failed", "InvalidSpec")
    assert "10, but max_outputs is 9" in outcome.message

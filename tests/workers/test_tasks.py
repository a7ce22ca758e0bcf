import math
import re

import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn

from ngd_dist.capture.likelihood import exact_gradients
from ngd_workers.contract.errors import SpecError, UserCodeError
from ngd_workers.contract.spec import (
    Erasing,
    ImageClassification,
    Labelling,
    Mixup,
    Regression,
    UserTask,
)
from ngd_workers.data import Dataset, Images, Vectors
from ngd_workers.data.tensors import TensorPart
from ngd_workers.launch.attempt import run_rank
from ngd_workers.tasks import build_task
from ngd_workers.tasks.base import LOSS, Result, Task
from ngd_workers.tasks.mixing import Mixer, erased
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.ranks import run_ranks
from tests.support.training import weights_at

HERE = "tests.workers.test_tasks"
F64 = torch.float64
IMAGES = Images(channels=1, height=4, width=4, classes=3)


class Returns(nn.Module):
    """A model whose output is given."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def with_ignored(*shape, ignore=-100):
    labels = torch.randint(3, shape)
    labels.view(-1)[::5] = ignore
    return labels


OF_OUTPUTS = {
    "classes": (ImageClassification(), IMAGES, (4, 3), lambda: torch.randint(3, (4,))),
    "smoothed and mixed": (
        ImageClassification(label_smoothing=0.1, mixup=Mixup(alpha=1, kind="batch")),
        IMAGES,
        (4, 3),
        lambda: torch.randint(3, (4,)),
    ),
    "pixels": (Labelling(), IMAGES, (2, 3, 2, 2), lambda: with_ignored(2, 2, 2)),
    "tokens": (Labelling(class_dim=-1, classes=3, ignore=255), None, (2, 5, 3), lambda: with_ignored(2, 5, ignore=255)),
    "one number": (Regression(outputs=1), None, (5,), lambda: torch.randn(5)),
    "three numbers": (Regression(), Vectors(width=7, outputs=3), (4, 3), lambda: torch.randn(4, 3)),
}


@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_the_likelihood_has_the_curvature_of_the_loss(name):
    torch.manual_seed(0)
    choice, shape, output_shape, labels = OF_OUTPUTS[name]
    task = build_task(choice, shape)
    batch = torch.zeros(output_shape[0], 1, 4, 4, dtype=F64), labels()
    output = torch.randn(output_shape, dtype=F64)

    result = task.train_batch(Returns(output), batch)
    hessian = torch.autograd.functional.hessian(lambda z: task.train_batch(Returns(z), batch).loss, output)
    read = None if result.ignored is None else ~result.ignored
    columns = torch.stack(list(exact_gradients(task.likelihood, result.output, "mean", read))).flatten(2)  # [V, N, D]

    samples = output_shape[0]
    blocks = torch.einsum("vni,vnj->nij", columns, columns) / samples
    assert torch.allclose(torch.block_diag(*blocks), hessian.reshape(output.numel(), -1), atol=1e-12)


def test_mean_iou_and_accuracy_are_those_of_all_labelled_positions():
    torch.manual_seed(1)
    task = build_task(Labelling(classes=4, ignore=255), None)  # class 3 never occurs, but is predicted
    batches = [(torch.randn(3, 4, 5, 5), with_ignored(3, 5, 5, ignore=255)) for _ in range(2)]

    results = [task.test_batch(Returns(logits), (logits, y)) for logits, y in batches]
    sums = {name: sum(result.sums[name].double() for result in results) for name in results[0].sums}
    metrics = task.summarize(sums, float(sum(result.count for result in results)))

    pairs = [
        (int(t), int(p))
        for logits, y in batches
        for t, p in zip(y.flatten(), logits.argmax(1).flatten(), strict=True)
        if t != 255
    ]
    ious = [
        sum(t == p == c for t, p in pairs) / sum(c in pair for pair in pairs)
        for c in range(4)
        if any(c in pair for pair in pairs)
    ]
    assert metrics["mean_iou"] == pytest.approx(sum(ious) / len(ious), rel=1e-12)
    assert metrics["accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs), rel=1e-12)


def test_a_batch_without_a_label_changes_nothing():
    task = build_task(Labelling(classes=3), None)
    logits = torch.randn(2, 3, 4, requires_grad=True)

    result = task.train_batch(Returns(logits), (logits, torch.full((2, 4), -100)))
    result.loss.backward()

    assert (result.loss.item(), int(result.count)) == (0, 0)
    assert not logits.grad.any()


def test_a_label_out_of_range_is_named():
    task = build_task(Labelling(classes=3), None)

    with pytest.raises(ValueError, match=r"in \[0, 3\) or task.ignore \(-100\), got 255; set task.ignore"):
        task.count((torch.zeros(1, 3, 2), torch.tensor([[0, 255]])))


@pytest.mark.parametrize(
    ("choice", "shape", "output", "labels", "message"),
    [
        (Labelling(classes=3), None, (2, 4, 3), (2, 4), r"shape \(2, 3, 4\) .*task.class_dim \(1\).* got an output of"),
        (Regression(outputs=2), None, (4, 1), (4, 2), r"2 numbers for each of 4 samples, got .* shape \(4, 1"),
        (Regression(outputs=1), None, (4, 1), (4, 2), r"targets of \(4, 2\)"),
    ],
)
def test_an_output_that_does_not_fit_is_named(choice, shape, output, labels, message):
    task = build_task(choice, shape)

    with pytest.raises(UserCodeError, match=message):
        task.train_batch(Returns(torch.zeros(output)), (torch.zeros(output), torch.zeros(labels, dtype=torch.long)))


@pytest.mark.parametrize(
    ("choice", "shape", "message"),
    [
        (Labelling(), None, "set task.classes"),
        (Regression(), None, "set task.outputs"),
        (ImageClassification(), None, r"don't say what a sample is; return .* with Images\(...\) or Vectors\("),
        (ImageClassification(top=(1, 5)), IMAGES, "number of classes, 3, got 5"),
        (ImageClassification(erasing=Erasing()), Vectors(width=4, outputs=3), "task.erasing takes rectangles"),
    ],
)
def test_data_that_do_not_fit_are_named(choice, shape, message):
    with pytest.raises(SpecError, match=message):
        build_task(choice, shape)


def test_running_mixup_mixes_with_the_mixed_batch_before():
    torch.manual_seed(0)
    mixer = Mixer(Mixup(alpha=1.0))
    targets = [torch.eye(12)[4 * t : 4 * t + 4] for t in range(3)]  # twelve samples of a class each

    mixed = [mixer(target.clone(), target) for target in targets]

    for x, target in mixed:
        assert torch.equal(x, target)  # the same weights
        assert torch.allclose(target.sum(1), torch.ones(4))
    own = [target[:, 4 * t : 4 * t + 4].diagonal() for t, (_, target) in enumerate(mixed)]
    assert torch.equal(own[0], torch.ones(4))
    assert all((share >= 0.5).all() for share in own)
    second, third = mixed[1][1], mixed[2][1]
    lam = own[2].unsqueeze(1)
    assert torch.allclose(third, lam * targets[2] + (1 - lam) * second)
    assert (third[:, :4].diagonal() > 0).all()  # the first batch is still there


def test_mixup_of_a_batch_takes_samples_of_it_alone():
    torch.manual_seed(0)
    mixer = Mixer(Mixup(alpha=1.0, kind="batch"))
    mixer(torch.eye(8)[:4], torch.eye(8)[:4])

    x, target = mixer(torch.eye(8)[4:], torch.eye(8)[4:])

    assert torch.equal(x, target)
    assert not target[:, :4].any()


def test_mixup_goes_on_if_the_batch_before_had_another_length():
    mixer = Mixer(Mixup(alpha=1.0))
    mixer(torch.ones(3, 1), torch.ones(3, 2))

    assert len(mixer(torch.ones(4, 1), torch.ones(4, 2))[0]) == 4


def test_erasing_takes_one_rectangle_within_bounds_to_zero():
    torch.manual_seed(0)
    choice = Erasing()
    images = torch.ones(2000, 2, 32, 48)

    lost = erased(choice, images) == 0

    assert torch.equal(lost[:, 0], lost[:, 1])
    rows, columns = lost[:, 0].any(2).sum(1), lost[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, lost[:, 0].sum((1, 2)))  # a rectangle
    hit = rows > 0
    assert abs(hit.float().mean() - 0.5) < 4 * math.sqrt(0.25 / 2000)
    area = (rows * columns)[hit] / (32 * 48)
    assert 0.01 < area.min() < 0.03  # 0.02 of 1,536 pixels, sides rounded
    assert 0.23 < area.max() < 0.27
    assert (rows > columns).any()
    assert (rows[hit] < columns[hit]).any()


@pytest.mark.parametrize("changes", [{"mixup": {"alpha": 0.4}}, {"erasing": {}}])
@pytest.mark.parametrize(
    "optimizer",
    [{"step_length": {"kind": "quadratic_model"}}, {"damping_rule": {"kind": "levenberg_marquardt"}}],
    ids=["quadratic_model", "levenberg_marquardt"],
)
def test_samples_that_change_are_refused_where_losses_are_compared(changes, optimizer):
    (kind,) = [choice["kind"] for choice in optimizer.values()]
    with pytest.raises(ValueError, match=f"optimizer's {kind} compares losses of the same samples.*leave both out"):
        small_spec(optimizer={"kind": "ngd", **optimizer}, task={"kind": "image_classification", **changes})


def test_a_job_with_mixup_and_erasing_learns_and_draws_the_same_again(tmp_path):
    task = {"kind": "image_classification", "mixup": {"alpha": 0.4}, "erasing": {}, "top": [1, 5]}
    spec = small_spec(task=task, schedule={"steps": 25}, optimizer={"kind": "ngd", "lr": 0.02, "damping": 0.01})

    first, again = (run_rank(make_attempt(tmp_path / name, spec)) for name in ("first", "again"))

    assert first.metrics == again.metrics
    assert first.metrics["accuracy"] > 0.8  # chance is 0.1
    assert first.metrics["top5_accuracy"] > 0.95


def pixels(**options):
    """Returns images whose pixels are to be told apart by their sign; some have no label, and not equally many."""
    torch.manual_seed(0)
    x = torch.randn(96, 1, 4, 4)
    y = (x[:, 0] > 0).long()
    for number, image in enumerate(y):
        image.view(-1)[: number % 16] = 255
    return Dataset(TensorPart(x[:64], y[:64]), TensorPart(x[64:], y[64:]), Images(1, 4, 4, classes=2))


def pixel_model(shape):
    return nn.Sequential(nn.Conv2d(1, 8, 1), nn.Tanh(), nn.Conv2d(8, shape.classes, 1))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"kind": "sgd", "lr": 0.1},
        {"kind": "ngd", "lr": 0.05, "damping": 0.01, "fisher": {"kind": "exact"}},
        {"kind": "ngd", "lr": 0.05, "damping": 0.01, "fisher": {"kind": "monte_carlo"}, "strategy": {"kind": "single"}},
    ],
    ids=["sgd", "exact", "monte_carlo"],
)
def test_pixels_without_a_label_count_for_nothing_however_the_batch_is_divided(tmp_path, optimizer):
    changes = {
        "data": function("pixels"),
        "model": function("pixel_model"),
        "task": {"kind": "labelling", "ignore": 255},
        "optimizer": optimizer,
        "schedule": {"steps": 12},
        "target": {"metric": "mean_iou", "value": 0.5},
    }
    whole, parts = (
        make_attempt(tmp_path / f"{size}", small_spec(**changes, batch={"global_size": 32, "micro_size": size}))
        for size in (32, 8)
    )

    outcome = run_rank(whole)
    run_rank(parts)

    assert outcome.metrics["mean_iou"] > 0.6
    assert list(outcome.metrics) == ["mean_iou", "accuracy", "loss"]
    curves = [[record.metrics["loss"] for record in records(spooled(attempt))] for attempt in (whole, parts)]
    if optimizer["kind"] == "sgd":  # a sampled Fisher draws other labels; an exact one has the mean of each micro-batch
        assert curves[1] == pytest.approx(curves[0], rel=1e-4)  # float32 sums in another order


def rows(**options):
    torch.manual_seed(0)
    x = torch.randn(131, 5)
    y = x @ torch.randn(5, 2) + 0.3 * torch.randn(131, 2) + 50
    return Dataset(TensorPart(x[:80], y[:80]), TensorPart(x[80:], y[80:]), Vectors(width=5, outputs=2))


def linear(shape):
    return nn.Linear(shape.width, shape.outputs)


def function(name, **options):
    return {"kind": "function", "function": f"{HERE}:{name}", "options": options}


def trained(rank, world_size, attempt):
    return run_rank(attempt).metrics


@pytest.mark.ranks
def test_r2_and_rmse_are_those_of_all_test_samples_on_two_ranks(tmp_path):
    spec = small_spec(
        data=function("rows"),
        model=function("linear"),
        task={"kind": "regression"},
        optimizer={"kind": "ngd", "lr": 0.3, "fisher": {"kind": "exact"}, "damping": 1e-4},
        batch={"global_size": 80},
        resources={"workers": 2},
    )

    first, second = run_ranks(2, trained, make_attempt(tmp_path, spec))

    weights, test = weights_at(tmp_path, 8), rows().test
    predicted = test.x.double() @ weights["weight"].double().T + weights["bias"].double()
    assert first == second
    assert list(first) == ["rmse", "r2", "loss"]
    assert first["r2"] == pytest.approx(r2_score(test.y.double(), predicted), rel=1e-5)
    assert first["rmse"] == pytest.approx(float((predicted - test.y).square().mean().sqrt()), rel=1e-5)


def test_the_natural_gradient_solves_linear_regression_in_one_step(tmp_path):
    spec = small_spec(
        data=function("rows"),
        model=function("linear"),
        task={"kind": "regression"},
        # Exact Fisher, no momentum, lr 1: Newton's step on a quadratic loss, if the likelihood's variance is right.
        optimizer={"kind": "ngd", "lr": 1.0, "momentum": 0, "fisher": {"kind": "exact"}, "damping": 1e-10},
        batch={"global_size": 80},
        schedule={"steps": 1},
        checkpoint={"every_steps": 1},
    )

    run_rank(make_attempt(tmp_path, spec))

    train, weights = rows().train, weights_at(tmp_path, 1)
    x = torch.cat([train.x, torch.ones(80, 1)], 1)
    best = torch.linalg.lstsq(x, train.y).solution
    assert torch.allclose(torch.cat([weights["weight"].T, weights["bias"][None]]), best, rtol=1e-3, atol=1e-3)


def test_an_output_that_never_changes_has_no_r2():
    task = build_task(Regression(outputs=1), None)
    result = task.test_batch(Returns(torch.zeros(4)), (None, torch.ones(4)))

    sums = {name: value.double() for name, value in result.sums.items()} | {"loss": torch.tensor(4.0)}

    assert math.isnan(task.summarize(sums, 4.0)["r2"])
    assert task.summarize(sums, 4.0)["rmse"] == 1


def squared_error(model, batch, scale=1.0):
    x, y = batch
    return scale * (model(x) - y).square().mean()


def no_loss(model, batch):
    return model(batch[0])


def unnamed(network, data):
    return (network(data[0]) - data[1]).square().mean()


def absolute_error(shape, power):
    class Absolute(Task):
        metrics = (LOSS,)

        def train_batch(self, model, batch):
            x, y = batch
            return Result((model(x) - y).abs().pow(power).mean(), output=model(x))

    return Absolute()


def no_metric(shape):
    task = absolute_error(shape, 1)
    task.metrics = ()
    return task


def own(name, optimizer=None, **options):
    return small_spec(
        data=function("rows"),
        model=function("linear"),
        task=function(name, **options),
        optimizer=optimizer or {"kind": "sgd", "lr": 0.1, "momentum": 0.5},
        batch={"global_size": 40},
    )


def test_a_training_step_is_a_task_whose_metric_is_its_loss(tmp_path):
    attempt = make_attempt(tmp_path, own("squared_error", scale=0.5))

    outcome = run_rank(attempt)

    assert spooled(attempt)[0].metrics == [LOSS]
    losses = [record.metrics["loss"] for record in records(spooled(attempt))]
    assert losses[-1] < 0.5 * losses[0]
    weights, test = weights_at(tmp_path, 8), rows().test
    predicted = test.x @ weights["weight"].T + weights["bias"]
    assert outcome.metrics == {"loss": pytest.approx(float(0.5 * (predicted - test.y).square().mean()), rel=1e-5)}


def test_a_training_step_goes_with_the_natural_gradient(tmp_path):
    outcome = run_rank(make_attempt(tmp_path, own("squared_error", {"kind": "ngd", "lr": 0.1, "damping": 1.0})))

    assert outcome.result == "succeeded"


def test_a_function_that_makes_a_task_gets_shape_and_options(tmp_path):
    assert run_rank(make_attempt(tmp_path, own("absolute_error", power=2))).result == "succeeded"


@pytest.mark.parametrize(
    ("name", "optimizer", "options", "message"),
    [
        ("squared_error", {"kind": "ngd", "fisher": {"kind": "monte_carlo"}}, {}, "task function has no likelihood"),
        ("no_loss", None, {}, r"must return its loss as a scalar tensor, got one of shape \(8, 2\)"),
        ("unnamed", None, {}, "missing a required argument: 'data'.*name its first two parameters model and batch"),
        ("linear", None, {}, "must return a ngd_workers.tasks.base.Task, got Linear; if it is a training step, name"),
        ("no_metric", None, {}, r"must have LOSS among them, got \(\)"),
        (
            "squared_error",
            None,
            {"scales": 2},
            "can't be called as task.function .*unexpected keyword argument 'scales'",
        ),
    ],
)
def test_a_function_that_is_no_task_fails_with_its_remedy(tmp_path, name, optimizer, options, message):
    outcome = run_rank(make_attempt(tmp_path, own(name, optimizer, **options)))

    assert outcome.result == "failed"
    assert re.search(message, outcome.message), outcome.message


def tagged():
    torch.manual_seed(0)
    x = torch.randn(96, 6)
    return Dataset(*(TensorPart(part, (part[:, :3] > 0).float()) for part in (x[:64], x[64:])), Vectors(6, 3))


@pytest.mark.parametrize(
    ("data", "task", "metric"), [("rows", "huber", "loss"), ("tagged", "Tagging", "recall")], ids=["step", "task"]
)
def test_tasks_of_the_guide_train(tmp_path, data, task, metric):
    fisher = {"kind": "empirical"} if task == "huber" else {"kind": "exact"}
    spec = small_spec(
        data=function(data),
        model=function("linear"),
        task={"kind": "function", "function": f"examples.jobs.own_task:{task}"},
        optimizer={"kind": "ngd", "lr": 0.1, "damping": 0.1, "fisher": fisher},
        batch={"global_size": 32},
    )

    outcome = run_rank(make_attempt(tmp_path, spec))

    assert outcome.message is None
    assert next(iter(outcome.metrics)) == metric


def test_a_task_is_built_from_the_address_of_a_function():
    assert build_task(UserTask(function=f"{HERE}:squared_error"), None).metrics == (LOSS,)

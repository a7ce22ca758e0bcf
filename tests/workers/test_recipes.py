import os
from pathlib import Path

import pytest

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec import JobSpec
from ngd_workers.contract.spec_file import load_spec
from ngd_workers.contract.spec_problems import parse_spec
from ngd_workers.launch.attempt import run_rank
from tests.support import ROOT
from tests.support.attempts import make_attempt, records, small_spec, spooled
from tests.support.methods import SHIPPED

RECIPES = sorted((ROOT / "workers" / "ngd_workers" / "recipes").glob("*.yaml"))

QUADRATIC = "{kind: ngd, step_length: {kind: quadratic_model}}"
GOOD = """
name: job
model: {kind: mlp}
data: {kind: digits}
optimizer: {kind: ngd}
schedule: {epochs: 1}
batch: {global_size: 64}
"""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_spec_of_its_file_s_name_with_a_target(path):
    spec = load_spec(path)

    assert spec.name == path.stem
    assert spec.target is not None


def test_baseline_differs_from_its_recipe_in_the_optimizer_alone():
    ngd, sgd = (load_spec(path) for path in RECIPES if path.stem in ("digits", "digits-sgd"))

    same = {"name": "", "optimizer": ngd.optimizer}
    assert ngd.model_copy(update=same) == sgd.model_copy(update=same)


def test_digits_recipe_learns_and_its_intervals_grow_past_one(tmp_path):
    spec = load_spec(next(path for path in RECIPES if path.stem == "digits"))
    alone = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 1})})
    attempt = make_attempt(tmp_path, alone)

    outcome = run_rank(attempt)

    events = spooled(attempt)
    last = records(events)[-1]
    grown = {name for name, interval in zip(events[0].statistics, last.intervals, strict=True) if interval > 1}
    assert {"block2.conv.A", "block3.conv.A", "hidden.A"} <= grown
    assert outcome.target_step is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*sorted(SHIPPED.keys() - {"kfac"}), "sngd"])
def test_each_method_has_a_recipe_that_reaches_its_target(tmp_path, kind):
    spec = load_spec(next(path for path in RECIPES if path.stem == f"digits-{kind}"))
    alone = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 1})})

    outcome = run_rank(make_attempt(tmp_path, alone))

    chosen = spec.transform if kind == "sngd" else spec.optimizer.preconditioner
    assert chosen.kind == kind
    assert outcome.target_step is not None


def test_adaptive_recipe_learns_within_four_epochs_without_an_lr(tmp_path):
    spec = load_spec(next(path for path in RECIPES if path.stem == "digits-adaptive"))
    schedule = spec.schedule.model_copy(update={"epochs": 4})
    alone = spec.resources.model_copy(update={"workers": 1})
    attempt = make_attempt(tmp_path, spec.model_copy(update={"resources": alone, "schedule": schedule}))

    outcome = run_rank(attempt)

    steps = records(spooled(attempt))
    assert steps[-1].damping < spec.optimizer.damping
    assert {step.momentum for step in steps} != {None}
    assert outcome.target_step is not None


@pytest.mark.slow
@pytest.mark.skipif("NGD_DATA_DIR" not in os.environ, reason="NGD_DATA_DIR is not set: no fashion-mnist/")
@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-adaptive"])
def test_fashion_mnist_recipe_reaches_its_target(tmp_path, name):
    spec = load_spec(next(path for path in RECIPES if path.stem == name))
    alone = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 1})})

    outcome = run_rank(make_attempt(tmp_path, alone, data_dir=Path(os.environ["NGD_DATA_DIR"])))

    assert outcome.target_step is not None
    assert outcome.metrics["accuracy"] >= 0.90


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("{kind: ngd}", "{kind: ngd, damping: 0}"),
            r"optimizer\.damping must be > 0, got 0 .*squared per-sample gradient",
        ),
        (("{kind: mlp}", "{kind: mpl}"), r"model\.kind must be one of .*, got \"mpl\" \(did you mean 'mlp'"),
        (("batch:", "bach:"), r"a job has no field 'bach' \(did you mean 'batch'"),
        (("global_size: 64", "global_size: many"), r"batch\.global_size must be a whole number, got \"many\""),
        (("{global_size: 64}", "{global_size: 9}\nresources: {workers: 2}"), "multiple of .* got 9; .* 8 and 10"),
        (("{global_size: 64}", "{global_size: 64, micro_size: 24}"), "must divide a worker's share, 64 .* got 24"),
        (("{epochs: 1}", "{epochs: 1, steps: 2}"), "exactly one of epochs and steps"),
        (
            ("{kind: ngd}\nschedule: {epochs: 1", f"{QUADRATIC}\nschedule: {{epochs: 1, warmup_steps: 5"),
            "schedule.lr must be constant and schedule.warmup_steps 0, got constant and 5; leave both out",
        ),
        (
            ("{kind: ngd}\nschedule: {epochs: 1", f"{QUADRATIC}\nschedule: {{epochs: 1, lr: {{kind: polynomial}}"),
            "schedule.lr must be constant and schedule.warmup_steps 0, got polynomial and 0; leave both out",
        ),
    ],
)
def test_wrong_spec_says_where_what_and_the_bound(tmp_path, change, message):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD.replace(*change))

    with pytest.raises(SpecError, match=message):
        load_spec(path)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "fisher: {kind: montecarlo}",
            r'fisher\.kind must be one of .*, got "montecarlo" \(did you mean \'monte_carlo\'',
        ),
        ("fisher: monte_carlo", r'optimizer\.fisher must be an object of fields, got "monte_carlo"'),
        ("fisher: {kind: exact, samples: 2}", r"optimizer\.fisher has no field 'samples' \(.*max_outputs"),
        ("fisher: {kind: exact, likelihood: {}}", r"optimizer\.fisher\.likelihood\.kind is missing \(it is one of cat"),
        (
            "fisher: {kind: exact, likelihood: {kind: gaussian}}",
            "fisher.likelihood follows from the task .* got gaussian; leave",
        ),
        (
            "fisher: {kind: exact, likelihood: {kind: categorical, class_dim: 2}}",
            "follows from the task in a job",
        ),
        ("damping_rule: {kind: levenberg_marquardt, decay: 1}", r"damping_rule\.decay must be < 1, got 1 \(omega"),
        ("damping_rule: {kind: levenberg_marquardt, low: 0.8}", "damping_rule: low must be < high, got 0.8 and 0.75"),
        ("clip: {kind: kl, max_norm: 1}", r"optimizer\.clip has no field 'max_norm' \(its fields are kind, max_kl\)"),
        ("fallback: {kind: adam}", r'fallback\.kind must be one of sgd, adamw, got "adam" \(did you mean \'adamw\''),
        ("exclude: head", r'optimizer\.exclude must be a list, got "head"'),
        ("exclude: [1]", r"optimizer\.exclude\.0 must be a text, got 1"),
        ("non_finite: ignore", r"""optimizer\.non_finite must be 'raise' or 'skip', got "ignore\""""),
        ("batch_dim: 1", "optimizer: batch_dim must be 0 in a job, .* got 1; leave it out"),
        ("lr: 0.1, step_length: {kind: quadratic_model}", r"optimizer: .* chooses lr and momentum: leave out \['lr'\]"),
    ],
)
def test_wrong_choice_says_where_what_and_the_bound(tmp_path, choice, message):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD.replace("{kind: ngd}", f"{{kind: ngd, {choice}}}"))

    with pytest.raises(SpecError, match=message) as caught:
        load_spec(path)

    assert len(str(caught.value).splitlines()) == 2  # the file, and one problem


def test_nesterov_without_momentum_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD.replace("{kind: ngd}", "{kind: sgd, momentum: 0, nesterov: true}"))

    with pytest.raises(SpecError, match=r"optimizer: nesterov needs momentum > 0, got 0: raise momentum, or leave"):
        load_spec(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1, ]]", "no YAML: .* at line 1, column 9"), ("- 1", "must be an object of fields"), (b"\xff", "no YAML")],
)
def test_file_that_is_no_spec_is_refused(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(SpecError, match=message):
        load_spec(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"absent\.yaml: No such file"):
        load_spec(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", "0.001", ".1e-2"])
def test_number_with_an_exponent_is_no_text(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD.replace("{kind: ngd}", f"{{kind: ngd, damping: {text}}}"))

    assert load_spec(path).optimizer.damping == 0.001


@pytest.mark.parametrize(
    "optimizer", [QUADRATIC, "{kind: ngd, exclude: [output, 'block*']}", "{kind: ngd, preconditioner: {kind: lngd}}"]
)
def test_spec_as_the_service_keeps_it_is_the_spec(tmp_path, optimizer):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD.replace("{kind: ngd}", optimizer))
    spec = load_spec(path)

    assert parse_spec(spec.model_dump(mode="json")) == spec
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_json_is_read_as_json(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(
        small_spec(data={"kind": "function", "function": "a:b"})
        .model_dump_json()
        .replace('"options":{}', '"options":{"face":"\\ud83d\\ude00"}')
    )

    assert load_spec(path).data.options == {"face": "\U0001f600"}

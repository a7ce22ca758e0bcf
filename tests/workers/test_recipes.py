import os
from pathlib import Path

import pytest

from tests.support.attempts import make_attempt, records, small_spec, spooled
from workers.attempt import run_rank
from workers.errors import SpecError
from workers.spec_file import load_spec

RECIPES = sorted((Path(__file__).parents[2] / "workers" / "recipes").glob("*.yaml"))

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
    ngd, sgd = (load_spec(path) for path in RECIPES if path.stem.startswith("digits"))

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
@pytest.mark.skipif("NGD_DATA_DIR" not in os.environ, reason="NGD_DATA_DIR is not set: no fashion-mnist/")
def test_fashion_mnist_recipe_reaches_its_target(tmp_path):
    spec = load_spec(next(path for path in RECIPES if path.stem == "fashion-mnist"))
    alone = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 1})})

    outcome = run_rank(make_attempt(tmp_path, alone, data_dir=Path(os.environ["NGD_DATA_DIR"])))

    assert outcome.target_step is not None
    assert outcome.test_accuracy is not None
    assert outcome.test_accuracy >= 0.90


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
    ],
)
def test_wrong_spec_says_where_what_and_the_bound(tmp_path, change, message):
    path = tmp_path / "job.yaml"
    path.write_text(GOOD.replace(*change))

    with pytest.raises(SpecError, match=message):
        load_spec(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "no YAML: .* at line 1, column 5"), ("- 1", "must be an object of fields"), (b"\xff", "no YAML")],
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


def test_json_is_read_as_json(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(
        small_spec(data={"kind": "function", "function": "a:b"})
        .model_dump_json()
        .replace('"options":{}', '"options":{"face":"\\ud83d\\ude00"}')
    )

    assert load_spec(path).data.options == {"face": "\U0001f600"}

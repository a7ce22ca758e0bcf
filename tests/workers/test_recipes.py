from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{kind: ngd}", "{kind: ngd, damping: 0}"), r"optimizer\.damping: .*greater than 0, got 0"),
        (("{kind: mlp}", "{kind: mpl}"), r"model: .*'mpl'.*'mlp'"),
        (("batch:", "bach:"), r"bach: Extra inputs"),
        (("global_size: 64", "global_size: many"), r"batch\.global_size: .*integer.*got 'many'"),
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


@pytest.mark.parametrize(("text", "message"), [("a: [", "neither YAML nor JSON"), ("- 1", "must be a mapping")])
def test_file_that_is_no_spec_is_refused(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_text(text)

    with pytest.raises(SpecError, match=message):
        load_spec(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"absent\.yaml: No such file"):
        load_spec(tmp_path / "absent.yaml")

"""The classifier keeps scikit-learn's contract, learns, and says plainly when data does not fit."""

import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from sklearn.utils.estimator_checks import check_estimator

from ngd_dist.exact.logistic import DuallyFlatClassifier
from tests.support import ROOT


def table(rows: int = 600) -> tuple[pd.DataFrame, np.ndarray[Any, Any]]:
    """Returns a table whose class is a colour's, but for one row in ten and where the height is above 1."""
    random = np.random.default_rng(0)
    colour = random.choice(["red", "green", "blue"], rows)
    height = random.normal(size=rows)
    kind = np.where(height > 1, "tall", np.where(colour == "red", "warm", "cold"))
    kind = np.where(random.random(rows) < 0.1, random.choice(["tall", "warm", "cold"], rows), kind)
    return pd.DataFrame({"height": height, "colour": colour}), kind


def test_scikit_learns_checks_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn tells of the checks that it skips
        results = check_estimator(DuallyFlatClassifier(), on_fail="raise")

    assert {result["check_name"] for result in results if result["status"] == "skipped"} <= {"check_array_api_input"}
    assert len(results) > 40


def test_real_features_are_learned_from_their_bins() -> None:
    x, y = load_iris(return_X_y=True)

    classifier = DuallyFlatClassifier(bins=6, random_state=0).fit(x[::2], y[::2])

    assert classifier.score(x[1::2], y[1::2]) > 0.9


def test_named_column_is_categorical_by_name_and_by_index() -> None:
    x, y = table()

    by_name = DuallyFlatClassifier(categorical=["colour"], random_state=0).fit(x, y)
    by_index = DuallyFlatClassifier(categorical=[1], random_state=0).fit(x.to_numpy(), y)

    assert by_name.score(x, y) > 0.85
    assert by_name.model_.sizes == (8, 3)
    np.testing.assert_array_equal(by_name.predict_proba(x), by_index.predict_proba(x.to_numpy()))


def test_random_state_decides_the_order() -> None:
    x, y = table()

    first, same, other = (
        DuallyFlatClassifier(categorical=[1], epochs=2, random_state=seed).fit(x, y).predict_proba(x)
        for seed in (0, 0, 1)
    )

    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0


def test_chunks_of_whole_batches_are_one_pass() -> None:
    x, y = table(640)
    categorical = {"colour": ["blue", "green", "red"]}
    classes = np.unique(y)
    whole = DuallyFlatClassifier(categorical=categorical).partial_fit(x[:320], y[:320], classes)
    chunks = DuallyFlatClassifier(categorical=categorical).partial_fit(x[:320], y[:320], classes)

    whole.partial_fit(x[320:], y[320:])
    for start in range(320, 640, 64):
        chunks.partial_fit(x[start : start + 64], y[start : start + 64])

    np.testing.assert_allclose(whole.predict_proba(x), chunks.predict_proba(x), rtol=1e-12)


def test_pickled_classifier_predicts_and_trains_on() -> None:
    x, y = table()
    classifier = DuallyFlatClassifier(categorical=["colour"], random_state=0).fit(x, y)

    copy = pickle.loads(pickle.dumps(classifier))

    np.testing.assert_array_equal(copy.predict_proba(x), classifier.predict_proba(x))
    np.testing.assert_array_equal(
        copy.partial_fit(x, y).predict_proba(x), classifier.partial_fit(x, y).predict_proba(x)
    )


def test_unknown_category_is_refused_and_a_listed_one_is_not() -> None:
    x, y = table()
    violet = pd.DataFrame({"height": [0.0], "colour": ["violet"]})
    colours = ["blue", "green", "red", "violet"]

    with pytest.raises(ValueError, match=r"column 'colour' has the unknown category 'violet'; it may be one of .*red"):
        DuallyFlatClassifier(categorical=["colour"]).fit(x, y).predict(violet)
    assert len(DuallyFlatClassifier(categorical={"colour": colours}).fit(x, y).predict(violet)) == 1


def test_numbers_and_text_may_be_categories_of_one_column() -> None:
    classifier = DuallyFlatClassifier(categorical={0: [1, "a", "b"]}, random_state=0)

    classifier.fit([[1], ["a"], [1], ["a"]], [0, 1, 0, 1])

    assert classifier.predict([[1], ["a"]]).tolist() == [0, 1]
    assert DuallyFlatClassifier(categorical=[0]).fit([[1], ["a"]], [0, 1]).model_.sizes == (2,)


@pytest.mark.parametrize(
    ("changed", "value", "sentence"),
    [
        ("height", np.nan, "column 'height' has a NaN or an infinite value"),
        ("colour", None, "column 'colour' has a NaN; give missing values a category"),
        ("height", "high", "column 'height' is not real; name it in categorical"),
    ],
)
def test_value_that_does_not_fit_names_its_column(changed: str, value: Any, sentence: str) -> None:
    x, y = table(50)
    x[changed] = x[changed].astype(object)
    x.loc[3, changed] = value

    with pytest.raises(ValueError, match=sentence):
        DuallyFlatClassifier(categorical=["colour"]).fit(x, y)


def test_nan_without_categorical_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="Input X contains NaN"):
        DuallyFlatClassifier().fit([[0.0], [np.nan]], [0, 1])


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 classes, and y has 1 class: 7"):
        DuallyFlatClassifier().fit([[0.0], [1.0]], [7, 7])


def test_calls_that_contradict_each_other_are_refused() -> None:
    x, y = [[0.0], [1.0]], [0, 1]

    with pytest.raises(ValueError, match="the first partial_fit needs classes"):
        DuallyFlatClassifier().partial_fit(x, y)
    with pytest.raises(ValueError, match="y has the class 2, which is not among"):
        DuallyFlatClassifier().partial_fit(x, y, classes=[0, 1]).partial_fit(x, [0, 2])
    with pytest.raises(ValueError, match="differ from those of the first call"):
        DuallyFlatClassifier().partial_fit(x, y, classes=[0, 1]).partial_fit(x, y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match=r"categorical names column 'colour', and X has columns 0\.\.0"):
        DuallyFlatClassifier(categorical=["colour"]).fit(x, y)
    with pytest.raises(ValueError, match="bins must be >= 2, got 1"):
        DuallyFlatClassifier(bins=1).fit(x, y)


def test_without_scikit_learn_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['sklearn'] = None; import ngd_dist.exact.logistic"

    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)

    assert "needs scikit-learn: pip install 'ngd-dist[sklearn]'" in ended.stderr

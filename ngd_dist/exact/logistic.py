"""Dually flat logistic regression as a classifier of scikit-learn."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

try:
    import numpy as np
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "ngd_dist.exact.logistic needs scikit-learn: pip install 'ngd-dist[sklearn]'", name=missing.name
    ) from missing
import torch

from ngd_dist.config.dually_flat import StepSize
from ngd_dist.exact.dually_flat import DuallyFlatRegression

__all__ = ["DuallyFlatClassifier"]

Values = np.ndarray[Any, np.dtype[Any]]


class DuallyFlatClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Multinomial logistic regression on categories, trained by DSNGD, with scikit-learn's interface.

    Real features are cut into at most `bins` categories at quantiles of the data of `fit`, or of the first
    `partial_fit`: the class's logit is a step function of each feature. Features with few distinct values need not be
    cut if `categorical` names them: a sequence of columns, by index or by name of a DataFrame's column, or a mapping
    from these to all categories that may come, or to None for those of the first data. A category that is not among
    them is refused.

    epochs: passes of `fit` over the data, each in an order that random_state decides. `partial_fit` makes one pass in
    the order of the data. a, b: the step size of step t is a / (1 + b t). batch_size: observations per step.
    prior_count: weight of the uniform distribution in the Fisher matrix, in observations; None is the number of
    categories of all features - features + 1. There are no sample weights and no penalty on the parameters.

    After fitting: classes_, n_features_in_, feature_names_in_ for a DataFrame, and model_, a `DuallyFlatRegression`.

    Raises ValueError for a NaN, an unknown category, one class, or settings out of range.
    Source: arXiv 2001.06744; the bins are ours.

    >>> x = [["red", 1.0], ["blue", 1.5], ["red", 2.0], ["blue", 0.5]]
    >>> classifier = DuallyFlatClassifier(categorical=[0], random_state=0).fit(x, ["warm", "cold", "warm", "cold"])
    >>> classifier.predict([["red", 1.9], ["blue", 0.7]])
    array(['warm', 'cold'], dtype='<U4')
    """

    def __init__(
        self,
        *,
        categorical: Sequence[int | str] | Mapping[int | str, Sequence[Any] | None] = (),
        bins: int = 8,
        epochs: int = 20,
        batch_size: int = 32,
        a: float = 0.03,
        b: float = 0.01,
        prior_count: float | None = None,
        random_state: Any = None,
    ) -> None:
        self.categorical = categorical
        self.bins = bins
        self.epochs = epochs
        self.batch_size = batch_size
        self.a = a
        self.b = b
        self.prior_count = prior_count
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Trains from the beginning. X [N, R]: an array or a DataFrame. y [N]: classes. Raises: ValueError."""
        X, y = self._checked(X, y, reset=True)
        self._start(X, np.unique(y))
        x_NR, y_N = self._codes(X), self._class_codes(y)
        random = check_random_state(self.random_state)
        for _ in range(self.epochs):
            order = torch.from_numpy(random.permutation(len(y_N)))
            self._pass(x_NR[order], y_N[order])
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Trains on a further chunk, in one pass in its order.

        classes: all classes that may come; the first call needs them. The first chunk decides where real features are
        cut, and which categories there are unless `categorical` lists them. Raises: ValueError.
        """
        is_first = not hasattr(self, "model_")
        if is_first and classes is None:
            raise ValueError("the first partial_fit needs classes: all classes that may come")
        X, y = self._checked(X, y, reset=is_first)
        if is_first:
            self._start(X, np.unique(classes))
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes {np.unique(classes)} differ from those of the first call, {self.classes_}")
        self._pass(self._codes(X), self._class_codes(y))
        return self

    def predict_proba(self, X: Any) -> Values:
        """Returns the probabilities [N, S] of the classes, in the order of classes_. Raises: ValueError."""
        check_is_fitted(self)
        codes = self._codes(self._checked(X, reset=False))
        return np.asarray(self.model_.logits(codes).softmax(1).numpy())

    def predict(self, X: Any) -> Values:
        """Returns the most probable class of each observation, [N]. Raises: ValueError."""
        best_N = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[best_N])

    def _checked(self, X: Any, y: Any = "no_validation", *, reset: bool) -> Any:
        """Returns X [N, R], float64 or, with categorical features, as it is, and y where it is given."""
        if not len(self.categorical):
            checked = validate_data(self, X, y, reset=reset, dtype=np.float64)
        else:  # a NaN in an array of objects is looked for by column
            X_as_is = X if hasattr(X, "columns") else np.asarray(X, dtype=object)
            checked = validate_data(self, X_as_is, y, reset=reset, dtype=object, ensure_all_finite=False)
        if isinstance(checked, tuple):
            check_classification_targets(checked[1])
        return checked

    def _start(self, X: Values, classes: Values) -> None:
        for name, least in (("bins", 2), ("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if len(classes) < 2:
            raise ValueError(f"a classifier needs at least 2 classes, and y has 1 class: {classes[0]}")
        named = self._named_columns()
        levels = []
        for i, column in enumerate(X.T):
            if i in named:
                listed = named[i]
                values = self._without_missing(i, column).tolist() if listed is None else listed
                levels.append(np.array(sorted(set(values), key=str), dtype=object))  # numbers and text may mix
            else:
                inner = np.linspace(0, 1, self.bins + 1)[1:-1]
                levels.append(np.unique(np.quantile(self._real(i, column), inner)))
        sizes = [len(level) + (i not in named) for i, level in enumerate(levels)]
        step_size = StepSize(a=self.a, b=self.b)
        model = DuallyFlatRegression(sizes, len(classes), step_size=step_size, prior_count=self.prior_count)
        self.classes_, self.model_, self._levels, self._categorical = classes, model, levels, frozenset(named)

    def _named_columns(self) -> dict[int, Sequence[Any] | None]:
        """Returns the categories of each categorical column, None where the data has them. Raises: ValueError."""
        listed = self.categorical if isinstance(self.categorical, Mapping) else dict.fromkeys(self.categorical)
        names = list(getattr(self, "feature_names_in_", ()))
        columns = {}
        for key, categories in listed.items():
            index = names.index(key) if key in names else key
            if not isinstance(index, int | np.integer) or not 0 <= index < self.n_features_in_:
                raise ValueError(
                    f"categorical names column {key!r}, and X has {names or f'columns 0..{self.n_features_in_ - 1}'}"
                )
            columns[int(index)] = categories
        return columns

    def _codes(self, X: Values) -> torch.Tensor:
        """Returns the categories [N, R], int64 from 0. Raises: ValueError."""
        codes = np.empty(X.shape, dtype=np.int64)
        for i, (column, level) in enumerate(zip(X.T, self._levels, strict=True)):
            if i in self._categorical:
                codes[:, i] = self._category_codes(i, self._without_missing(i, column), level)
            else:
                codes[:, i] = np.searchsorted(level, self._real(i, column), side="right")
        return torch.from_numpy(codes)

    def _category_codes(self, i: int, column: Values, level: Values) -> list[int]:
        code_of = {value: code for code, value in enumerate(level.tolist())}
        unknown = sorted({str(value) for value in column.tolist() if value not in code_of})
        if unknown:
            raise ValueError(
                f"column {self._name(i)!r} has the unknown category {unknown[0]!r}; it may be one of {level.tolist()}. "
                f"Name all of them: categorical={{{self._name(i)!r}: [...]}}"
            )
        return [code_of[value] for value in column.tolist()]

    def _real(self, i: int, column: Values) -> Values:
        try:
            real = np.asarray(column, dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"column {self._name(i)!r} is not real; name it in categorical ({error})") from error
        if not np.isfinite(real).all():
            raise ValueError(f"column {self._name(i)!r} has a NaN or an infinite value; fill it, or drop the row")
        return real

    def _without_missing(self, i: int, column: Values) -> Values:
        if any(value is None or value != value for value in column.tolist()):
            raise ValueError(f"column {self._name(i)!r} has a NaN; give missing values a category, such as 'missing'")
        return column

    def _name(self, i: int) -> int | str:
        return str(self.feature_names_in_[i]) if hasattr(self, "feature_names_in_") else i

    def _class_codes(self, y: Values) -> torch.Tensor:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y has the class {unknown[0]}, which is not among {self.classes_}")
        return torch.from_numpy(np.searchsorted(self.classes_, y).astype(np.int64))

    def _pass(self, x_NR: torch.Tensor, y_N: torch.Tensor) -> None:
        for x, y in zip(x_NR.split(self.batch_size), y_N.split(self.batch_size), strict=True):
            self.model_.step(x, y)

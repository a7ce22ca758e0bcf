"""A metric's name is its own: neither a field of a step, nor what marks the values of the test data."""

import pytest
from pydantic import ValidationError

from ngd_workers.contract.events import Evaluation, Metric, StepRecord
from ngd_workers.contract.names import TAKEN
from ngd_workers.contract.rundir import Outcome


@pytest.mark.parametrize("name", ["lr", "seconds", "samples_per_s", "step", "damping", "skipped_samples", "metrics"])
def test_name_of_a_step_s_field_is_refused(name: str) -> None:
    said = rf"a metric can't be called '{name}': each step has such a field; choose another name"

    with pytest.raises(ValidationError, match=said):
        StepRecord(step=1, time_s=0.0, metrics={name: 1.0})
    with pytest.raises(ValidationError, match=said):
        Metric(name=name, label="mine", better="lower")


def test_name_that_marks_test_values_is_refused() -> None:
    with pytest.raises(ValidationError, match="can't be called 'test_loss': test_ marks the values of the test data"):
        Evaluation(step=1, metrics={"test_loss": 1.0})


def test_other_names_are_taken() -> None:
    assert StepRecord(step=1, time_s=0.0, metrics={"tests": 1.0, "lr2": 2.0}).metrics == {"tests": 1.0, "lr2": 2.0}


def test_outcome_of_an_older_version_keeps_its_numbers() -> None:
    ended = Outcome.model_validate_json('{"result": "succeeded", "step": 9, "test_accuracy": 0.9, "test_loss": "NaN"}')
    failed = Outcome.model_validate_json('{"result": "failed", "test_accuracy": null, "test_loss": null}')

    assert (ended.metrics["accuracy"], str(ended.metrics["loss"])) == (0.9, "nan")
    assert failed.metrics == {}


def test_every_other_curve_s_name_is_taken():
    assert set(StepRecord.model_fields) == TAKEN

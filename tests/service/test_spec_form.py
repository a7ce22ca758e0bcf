"""The settings that the form of a job has: from the JSON schema of its spec, whatever the spec holds."""

from typing import Any

import pytest

from ngd_service.dashboard.spec_form import foreign, settings_of
from tests.support.attempts import small_spec

SPEC = small_spec().model_dump(mode="json")


def by_pointer(spec: dict[str, Any]) -> dict[str, Any]:
    return {setting.pointer: setting for setting in settings_of(spec)}


def test_kinds_decide_on_the_settings() -> None:
    sgd, ngd = by_pointer(SPEC), by_pointer(SPEC | {"optimizer": {"kind": "ngd"}})

    assert "/optimizer/damping" not in sgd
    assert ngd["/optimizer/damping"].default == 0.1
    assert "sgd" in sgd["/optimizer/kind"].options
    assert by_pointer(SPEC | {"model": {"kind": "torchvision"}})["/model/name"].is_required
    assert by_pointer({"train": {"function": "mine:train"}}).keys() >= {"/train/function", "/train/steps"}
    assert "/init_from/run_dir" in by_pointer(SPEC | {"init_from": {"kind": "checkpoint"}})
    assert "/init_from/kind" not in sgd


@pytest.mark.parametrize(
    "changes",
    [{"model": "mlp"}, {"model": {"kind": ["mlp"]}}, {"optimizer": None}, {"schedule": [1]}, {"target": 3}, {1: 2}],
)
def test_every_spec_has_a_form(changes: dict[Any, Any]) -> None:
    settings = by_pointer(SPEC | changes)

    assert "/name" in settings
    for setting in settings.values():
        setting.value_in(SPEC | changes)


def test_settings_of_another_kind_are_foreign_to_the_new_one() -> None:
    spec = SPEC | {"optimizer": {"kind": "ngd", "lr": 0.1, "damping": 0.1, "staleness": {"kind": "adaptive"}}}

    assert foreign(spec, ["optimizer"], "adamw") == [("optimizer", "damping"), ("optimizer", "staleness")]
    assert foreign(spec | {"model": "mlp"}, ["model"], "mlp") == []

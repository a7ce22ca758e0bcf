"""The text of a job, changed in one setting: the rest stays as it was written."""

import pytest

from ngd_service.client.spec_text import lines_of, read, with_setting, without_setting, written

YAML = """\
# mine: hä 日本
name: a   # its name
optimizer:
  kind: sgd   # plain
  lr: 0.1

  # after a line
  betas: {one: 0.9, two: [1, 2]}
batch: {global_size: 64, micro_size: 8}
target: {metric: accuracy}
"""


@pytest.mark.parametrize(
    ("path", "value", "old", "new"),
    [
        ("name", "b", "name: a ", "name: b "),
        ("name", "1e-3", "name: a ", 'name: "1e-3" '),
        ("name", "häuser & co", "name: a ", 'name: "häuser & co" '),
        ("optimizer.lr", 1e-05, "lr: 0.1", "lr: 1e-05"),
        ("optimizer.betas.one", 1, "{one: 0.9,", "{one: 1,"),
        ("optimizer.momentum", 0.5, "[1, 2]}\n", "[1, 2]}\n  momentum: 0.5\n"),
        ("optimizer.betas.three.x", True, "[1, 2]}", "[1, 2], three: {x: true}}"),
        ("seed", 3, "accuracy}\n", "accuracy}\nseed: 3\n"),
        ("checkpoint.keep", 3, "accuracy}\n", "accuracy}\ncheckpoint: {keep: 3}\n"),
    ],
)
def test_value_is_put_in_its_place(path: str, value: object, old: str, new: str) -> None:
    assert YAML.count(old) == 1

    assert with_setting(YAML, path.split("."), value) == YAML.replace(old, new)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("name", "name: a   # its name\n", ""),
        ("optimizer.lr", "  lr: 0.1\n", ""),
        ("batch.micro_size", ", micro_size: 8", ""),
        ("batch.global_size", "global_size: 64, ", ""),
        ("target.metric", "target: {metric: accuracy}\n", ""),
        ("schedule.steps", "", ""),
        ("name.kind", "", ""),
    ],
)
def test_setting_is_taken_out(path: str, old: str, new: str) -> None:
    assert without_setting(YAML, path.split(".")) == YAML.replace(old, new)


@pytest.mark.parametrize(
    "text", ["", "# nothing yet\n", "name:\n", "name: |\n  x\n", '{"name": "b"}', "name: &a b\n", "[1, 2]", "text"]
)
def test_every_text_holds_the_new_value_afterwards(text: str) -> None:
    assert read(with_setting(text, ["name"], "c")) == {"name": "c"}
    assert read(with_setting(text, ["a", "b"], 1.5))["a"] == {"b": 1.5}  # type: ignore[index]


def test_json_stays_json() -> None:
    assert with_setting('{"a": {"b": 1}}', ["a", "c"], "no") == '{"a": {"b": 1, "c": "no"}}'


def test_text_that_can_not_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="no YAML"):
        with_setting("name: [", ["name"], 1)


def test_lines_are_known_by_pointer() -> None:
    lines = lines_of(YAML + "list: [a,\n  b]\n")

    assert (lines["/name"], lines["/optimizer/betas/one"], lines["/list/1"]) == (2, 8, 12)


def test_long_parts_are_written_on_lines_of_their_own() -> None:
    spec = {"a": {"b": 1}, "long": {"first": "x" * 60, "second": ["y" * 60], "third": {}}}

    assert written(spec).splitlines() == [
        "a: {b: 1}", "long:", f"  first: {'x' * 60}", f"  second: [{'y' * 60}]", "  third: {}"
    ]  # fmt: skip

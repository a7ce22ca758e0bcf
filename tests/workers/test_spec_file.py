"""A spec is read by YAML 1.2's core schema and by JSON; what may mean two things is refused with its line."""

import contextlib
import math
import re
import time
from pathlib import Path

import pytest

from ngd_workers.contract.errors import SpecError
from ngd_workers.contract.spec_file import MAX_YAML_BYTES, load_spec, parse_json, parse_yaml

MIB = 1 << 20
CPU_S = 2.0  # ten times what is measured; the pure-Python loader took 22 for a MiB


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("-7", -7),
        ("+12", 12),
        ("190:20:30", "190:20:30"),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1e-3", 1e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        (".INF", math.inf),
        ("true", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("~", None),
        ("", None),
        ("null", None),
        ("2026-11-28", "2026-11-28"),
        ("'010'", "010"),
        ('"true"', "true"),
        ("!!str 010", "010"),
        ("!!int '010'", 10),
        ("!!float 1", 1.0),
        ("<<", "<<"),
    ],
)
def test_yaml_scalar_is_that_of_the_core_schema(text: str, value: object) -> None:
    parsed = parse_yaml(f"a: {text}\n".encode())

    assert isinstance(parsed, dict)
    assert (parsed["a"], type(parsed["a"])) == (value, type(value))


def test_yaml_nan_is_a_number() -> None:
    (value,) = parse_yaml(b"[.nan]")  # type: ignore[misc]

    assert math.isnan(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "the name 'a' stands twice in one object; leave one out at line 3, column 1"),
        ("o: {a: 1, 'a': 2}", "the name 'a' stands twice in one object; leave one out at line 1, column 11"),
        ("a: &x 1\nb: *x", "aliases (*name) are not read; write the value again at line 2, column 4"),
        ("a: !!binary YWJj", "the tag 'tag:yaml.org,2002:binary' is not read; leave it out at line 1, column 4"),
        ("a: !new [1]", "the tag '!new' is not read; leave it out at line 1, column 4"),
        ("a: !!int x", "'x' is no int; leave the tag out at line 1, column 4"),
        ("? [a]\n: 1", "a list or an object can't be a name; write a text at line 1, column 3"),
        ("a: 1\n---\nb: 2", "there is a second document; give each job a file of its own at line 2, column 1"),
        ("[" * 33, "values may lie 32 levels deep, and one lies deeper; flatten them at line 1, column 33"),
    ],
)
def test_yaml_that_may_mean_two_things_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^no YAML: {re.escape(problem)}$"):
        parse_yaml(text.encode())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1,\n"b": {"a": 2},\n"a": 3}', 3),
        ('{"o": [{"a": {"b": "{\\"a\\":"}},\n{"a": 1, "b": ":", "\\u0061": 2}]}', 2),
    ],
)
def test_json_with_a_name_twice_is_refused_with_its_line(text: str, line: int) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        with pytest.raises(ValueError, match=f"^no JSON: the name 'a' stands twice in one object.* at line {line}$"):
            parse_json(text.encode(encoding))


def test_spec_with_a_name_twice_does_not_train(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: a\nseed: 1\nseed: 2\n")

    with pytest.raises(SpecError, match="'seed' stands twice in one object; leave one out at line 3, column 1"):
        load_spec(file)


def test_steps_have_a_bound(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("schedule: {steps: 1000000001}\n")

    with pytest.raises(SpecError, match=r"schedule\.steps must be <= 1000000000, got 1000000001"):
        load_spec(file)


def test_yaml_has_a_bound_of_its_own() -> None:
    with pytest.raises(ValueError, match="its 65,537 bytes are more than the 65,536 that are read; give it as JSON"):
        parse_yaml(b" " * (MAX_YAML_BYTES + 1))


WORST_YAML = [b"[", b"{a: ", b"- ", b"? ", b"&a ", b"[1,", b"a,", b"- a\n", b"'", b'"', b"a\n ", b"!!a ", b"{", b"[],"]
WORST_JSON = [b"[", b'{"a":', b"{},", b"1,", b'"",', b"[],", b'{"a":1,"a":1},', b"1" * 4300 + b",", b'"\\u0061",']


@pytest.mark.parametrize("opening", [b"", b"["])
@pytest.mark.parametrize("piece", WORST_YAML)
def test_no_yaml_takes_long(piece: bytes, opening: bytes) -> None:
    assert _cpu_s(parse_yaml, opening + piece * ((MAX_YAML_BYTES - 2) // len(piece))) < CPU_S


@pytest.mark.parametrize("piece", WORST_JSON)
def test_no_json_takes_long(piece: bytes) -> None:
    assert _cpu_s(parse_json, b"[" + piece * ((MIB - 3) // len(piece)) + b"1]") < CPU_S


def _cpu_s(parse: object, text: bytes) -> float:
    assert callable(parse)
    began_s = time.thread_time()
    with contextlib.suppress(ValueError):
        parse(text)
    return time.thread_time() - began_s

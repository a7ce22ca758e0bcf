"""Secrets of an installation: one key, kept to its owner, and what is derived from it."""

from pathlib import Path

import pytest

from ngd_service.auth.tokens import Tokens, read_key, read_or_create_key
from ngd_service.errors import PageTokenError, StartupError

TOKENS = Tokens(b"k" * 32)


def test_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    key = read_or_create_key(tmp_path / "key")

    assert read_or_create_key(tmp_path / "key") == key
    assert len(key) == 32
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"k" * 32, b"6b" * 32, b"6B" * 32 + b"\n"])
def test_given_key_is_read_raw_or_in_hex(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)

    assert read_key(tmp_path / "key") == b"k" * 32


@pytest.mark.parametrize(("content", "size"), [(b"", 0), (b"k" * 31, 31), (b"6g" * 32, 64), (b"6b" * 33, 66)])
def test_given_key_of_another_size_is_refused(tmp_path: Path, content: bytes, size: int) -> None:
    (tmp_path / "key").write_bytes(content)

    with pytest.raises(StartupError, match=rf"must be 64 hex digits or 32 bytes, got {size} bytes.*openssl rand"):
        read_key(tmp_path / "key")


def test_given_key_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"can't read the signing key .*No such file.*NGD_SIGNING_KEY_FILE"):
        read_key(tmp_path / "key")


def test_damaged_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"short")

    with pytest.raises(StartupError, match="must hold 32 bytes, got 5"):
        read_or_create_key(tmp_path / "key")


def test_attempts_token_is_its_own_and_lasts_over_a_restart() -> None:
    token = TOKENS.of_attempt("job_x-a1")

    assert Tokens(b"k" * 32).is_of_attempt("job_x-a1", token)
    assert not TOKENS.is_of_attempt("job_x-a2", token)
    assert not Tokens(b"j" * 32).is_of_attempt("job_x-a1", token)
    assert not TOKENS.is_of_attempt("job_x-a1", "\u00e9")


def test_page_token_is_good_for_its_own_query_alone() -> None:
    token = TOKENS.page((0.5, "job_x"), "RUNNING")

    assert TOKENS.cursor(token, "RUNNING") == (0.5, "job_x")
    with pytest.raises(PageTokenError, match="other filters"):
        TOKENS.cursor(token, "FAILED")


@pytest.mark.parametrize("token", ["a", "????", "_" * 9, "\u00e9"])
def test_page_token_of_nobody_is_refused(token: str) -> None:
    with pytest.raises(PageTokenError):
        TOKENS.cursor(token, "")


def test_token_of_an_attempt_that_an_earlier_version_started_stays_good() -> None:
    token = "a15b2bd41cd18a7e5f0133b47b707b490558635d56ff5faebbb342340e112980"

    assert TOKENS.is_of_attempt("job_x-a1", token)

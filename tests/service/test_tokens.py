"""Secrets of an installation: one key, kept to its owner, and what is derived from it."""

from pathlib import Path

import pytest

from service.errors import PageTokenError, StartupError
from service.tokens import Tokens, read_or_create_key

TOKENS = Tokens(b"k" * 32)


def test_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    key = read_or_create_key(tmp_path / "key")

    assert read_or_create_key(tmp_path / "key") == key
    assert len(key) == 32
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


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
    token = TOKENS.page("job_x", "RUNNING")

    assert TOKENS.before_id(token, "RUNNING") == "job_x"
    with pytest.raises(PageTokenError, match="other filters"):
        TOKENS.before_id(token, "FAILED")


@pytest.mark.parametrize("token", ["a", "????", "_" * 9, "\u00e9"])
def test_page_token_of_nobody_is_refused(token: str) -> None:
    with pytest.raises(PageTokenError):
        TOKENS.before_id(token, "")

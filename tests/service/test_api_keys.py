"""A folder of API keys: what is taken, what is refused in one sentence, and what a change of it does."""

import logging
from pathlib import Path

import pytest

from ngd_service.auth import api_keys
from ngd_service.auth.access import SESSION_COOKIE, SESSION_S, Access
from ngd_service.auth.api_keys import ApiKeys
from ngd_service.auth.tokens import Tokens
from ngd_service.errors import StartupError
from tests.support.keys import ALICE, BOB, swap_volume, write_keys

TOKENS = Tokens(b"k" * 32)


@pytest.fixture(autouse=True)
def _read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "REREAD_S", 0.0)


def open_session(access: Access, key: str) -> str:
    opened = access.session(key)
    assert opened is not None
    return f"other=1; {SESSION_COOKIE}={opened[1]}"


def test_key_tells_who_holds_it(tmp_path: Path) -> None:
    keys = ApiKeys(write_keys(tmp_path, alice=ALICE, bob=BOB))

    assert [keys.key_owner_of(key) for key in (ALICE, BOB, ALICE[:-1], "", "\u00e9")] == [
        "alice",
        "bob",
        None,
        None,
        None,
    ]


def test_volume_that_kubernetes_swaps_is_read_again(tmp_path: Path) -> None:
    keys = ApiKeys(swap_volume(tmp_path, "v1", alice=ALICE))

    swap_volume(tmp_path, "v2", alice="a-new-key-of-alice-0123", bob=BOB)

    assert [keys.key_owner_of(key) for key in (ALICE, "a-new-key-of-alice-0123", BOB)] == [None, "alice", "bob"]


@pytest.mark.parametrize(
    "key", ["short", "a" * 19, "a" * 1025, "with a space in its middle", "\u00fc" * 20, "a\t" * 20]
)
def test_change_that_is_wrong_is_logged_once_and_keeps_who_stayed_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    keys = ApiKeys(write_keys(tmp_path, alice=ALICE))

    write_keys(tmp_path, bob=key, carol=BOB)

    with caplog.at_level(logging.ERROR):
        assert [keys.key_owner_of(ALICE), keys.key_owner_of(BOB), keys.key_owner_of(ALICE)] == ["alice", None, "alice"]
    (record,) = caplog.records
    assert "api_keys_wrong holders=alice dropped= error=the API key in" in record.getMessage()
    assert key not in record.getMessage()


def test_key_that_is_withdrawn_is_refused_whatever_else_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    carol = "carol-0123456789-0123456789"
    keys = ApiKeys(write_keys(tmp_path, alice=ALICE, bob=BOB, carol=carol))

    (tmp_path / "alice").unlink()
    write_keys(tmp_path, bob="short")

    with caplog.at_level(logging.ERROR):
        assert [keys.key_owner_of(key) for key in (ALICE, BOB, carol)] == [None, None, "carol"]
    (record,) = caplog.records
    assert "api_keys_wrong holders=carol dropped=alice,bob error=the API key in" in record.getMessage()

    write_keys(tmp_path, bob=BOB)
    assert [keys.key_owner_of(key) for key in (ALICE, BOB, carol)] == [None, "bob", "carol"]


def test_key_that_another_is_given_too_stays_its_holders(tmp_path: Path) -> None:
    keys = ApiKeys(write_keys(tmp_path, bob=BOB))

    write_keys(tmp_path, alice=BOB)

    assert keys.key_owner_of(BOB) == "bob"


def test_folder_that_is_emptied_lets_nobody_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(write_keys(tmp_path, alice=ALICE))

    (tmp_path / "alice").unlink()

    with caplog.at_level(logging.ERROR):
        assert [keys.key_owner_of(ALICE), keys.key_owner_of(ALICE)] == [None, None]
    (record,) = caplog.records
    assert "api_keys_wrong holders= dropped=alice error=there is no API key in" in record.getMessage()


def test_folder_that_vanishes_keeps_the_old_keys(tmp_path: Path) -> None:
    keys = ApiKeys(write_keys(tmp_path / "keys", alice=ALICE))

    (tmp_path / "keys").rename(tmp_path / "away")

    assert keys.key_owner_of(ALICE) == "alice"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, r"no API key in .*NGD_API_KEYS_DIR.*openssl rand -hex 32"),
        ({"alice": "a" * 19}, r"alice must have 20 to 1024 characters, got 19; make one with: openssl"),
        ({"alice": ""}, r"alice must have 20 to 1024 characters, got 0"),
        ({"alice": "two words of more than 20"}, r"alice must be visible ASCII characters without spaces"),
        ({"not a name": ALICE}, r"1 to 63 letters, digits, .* got 'not a name'"),
        ({"n" * 64: ALICE}, r"1 to 63 letters"),
        ({"alice": ALICE, "bob": ALICE}, r"alice and bob have the same API key in"),
    ],
)
def test_start_with_wrong_keys_is_refused_in_a_sentence(tmp_path: Path, content: dict[str, str], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        ApiKeys(write_keys(tmp_path, **content))


def test_folder_that_is_not_there_or_holds_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"can't read the API keys in .*nowhere: No such file.*NGD_API_KEYS_DIR"):
        ApiKeys(tmp_path / "nowhere")
    (tmp_path / "alice").mkdir()
    with pytest.raises(StartupError, match=r"alice: Is a directory"):
        ApiKeys(tmp_path)


def test_session_is_known_to_every_controller_with_the_same_keys(tmp_path: Path) -> None:
    folder = write_keys(tmp_path, alice=ALICE)
    session = open_session(Access(ApiKeys(folder), TOKENS), ALICE)

    assert Access(ApiKeys(folder), TOKENS).key_owner(None, session) == "alice"
    assert Access(ApiKeys(folder), Tokens(b"o" * 32)).key_owner(None, session) is None


def test_session_ends_with_its_holders_key_and_no_other(tmp_path: Path) -> None:
    access = Access(ApiKeys(write_keys(tmp_path, alice=ALICE, bob=BOB)), TOKENS)
    of_alice, of_bob = open_session(access, ALICE), open_session(access, BOB)

    write_keys(tmp_path, alice="a-new-key-of-alice-0123")

    assert [access.key_owner(None, session) for session in (of_alice, of_bob)] == [None, "bob"]


def test_session_ends_after_its_time(tmp_path: Path) -> None:
    now_s = [1_000_000.0]
    access = Access(ApiKeys(write_keys(tmp_path, alice=ALICE)), TOKENS, now_s=lambda: now_s[0])
    session = open_session(access, ALICE)

    now_s[0] += SESSION_S - 1
    assert access.key_owner(None, session) == "alice"
    now_s[0] += 2
    assert access.key_owner(None, session) is None


@pytest.mark.parametrize("place", range(0, 120, 7))
def test_session_with_a_changed_character_is_nobody_s(tmp_path: Path, place: int) -> None:
    access = Access(ApiKeys(write_keys(tmp_path, alice=ALICE, alicf=BOB)), TOKENS)
    session = open_session(access, ALICE)
    start = session.index("=", 7) + 1 + place % (len(session) - 40)

    changed = session[:start] + ("A" if session[start] != "A" else "B") + session[start + 1 :]

    assert access.key_owner(None, changed) is None


@pytest.mark.parametrize("session", ["", "=", "e30", "\u00e9", "YSBiIGM", "a" * 5000])
def test_text_that_is_no_session_is_nobody_s(tmp_path: Path, session: str) -> None:
    access = Access(ApiKeys(write_keys(tmp_path, alice=ALICE)), TOKENS)

    assert access.key_owner(None, f"{SESSION_COOKIE}={session}") is None


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "bearer x", f"Bearer x {ALICE}"])
def test_header_that_is_wrong_is_not_made_up_for_by_a_session(tmp_path: Path, header: str) -> None:
    access = Access(ApiKeys(write_keys(tmp_path, alice=ALICE)), TOKENS)

    assert access.key_owner(header, open_session(access, ALICE)) is None
    assert access.key_owner(f"bearer  {ALICE}", None) == "alice"


@pytest.mark.parametrize("header", ["", "Basic cHJveHk6cGFzcw==", f"Basic {ALICE}", ALICE, "Negotiate x"])
def test_header_of_a_proxy_does_not_stand_in_for_a_session(tmp_path: Path, header: str) -> None:
    access = Access(ApiKeys(write_keys(tmp_path, alice=ALICE, bob=BOB)), TOKENS)

    assert access.key_owner(header, open_session(access, BOB)) == "bob"
    assert access.key_owner(header, None) is None

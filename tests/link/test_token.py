"""The token: one word that comes back whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from propolis.link.token import Token
from propolis.secure.errors import UsageError
from propolis.secure.identity import Root, Roster, SigningKey

ROOT = Root(SigningKey.generate())
_, INVITATION, KEY = ROOT.invite(
    Roster(ROOT.federation, 1, 2**40, ()), "clinic", not_after=1_900_000_000, root_online=True
)
TOKEN = Token(INVITATION, KEY.private, ROOT.public_key, bytes(range(32)))
TEXT = TOKEN.to_text()


def test_a_token_comes_back_as_it_was() -> None:
    assert Token.from_text(TEXT) == TOKEN
    invitation = Token.from_text(TEXT).verified()
    assert (invitation.name, invitation.not_after, invitation.root_online) == ("clinic", 1_900_000_000, True)


def test_broken_lines_do_not_count() -> None:
    assert Token.from_text(f"  {TEXT[:70]}\n{TEXT[70:]}\r\n") == TOKEN


def test_the_last_character_counts_whole() -> None:
    """It stands for fewer bits than it could: several characters would decode alike."""
    for name in ("a", "ab", "abc"):
        _, invitation, key = ROOT.invite(Roster(ROOT.federation, 1, 2**40, ()), name)
        text = replace(TOKEN, invitation=invitation, private_key=key.private).to_text()
        for typed in set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") - {text[-1]}:
            with pytest.raises(UsageError, match="mistyped or cut"):
                Token.from_text(text[:-1] + typed)


@given(st.integers(0, len(TEXT) - 1), st.sampled_from("ABCxyz019-_=+/ \u00e9"))
def test_one_mistyped_character_is_told(place: int, typed: str) -> None:
    mistyped = TEXT[:place] + typed + TEXT[place + 1 :]
    if "".join(mistyped.split()) != TEXT:
        with pytest.raises(UsageError, match=r"mistyped or cut|no token"):
            Token.from_text(mistyped)


@pytest.mark.parametrize("length", [*range(11, len(TEXT), 7), len(TEXT) - 1])
def test_a_cut_token_is_told(length: int) -> None:
    with pytest.raises(UsageError, match="mistyped or cut: copy the whole of it"):
        Token.from_text(TEXT[:length])


@pytest.mark.parametrize("text", ["", "hello", "propolis-2-AAAA", "propolis-1-" + "A" * 5000])
def test_what_is_no_token_is_told(text: str) -> None:
    with pytest.raises(UsageError, match=r"this is no token: one begins with propolis-1-"):
        Token.from_text(text)


def test_a_token_of_another_version_is_told() -> None:
    with pytest.raises(UsageError, match="another version"):
        Token.from_text(replace(TOKEN, version=2).to_text())


def test_a_token_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="signature on an invitation"):
        replace(TOKEN, root_key=Root(SigningKey.generate()).public_key).verified()
    with pytest.raises(UsageError, match="its key is not the invitation's"):
        replace(TOKEN, private_key=bytes(32)).verified()


def test_a_token_does_not_show_its_secret() -> None:
    assert KEY.private.hex() not in repr(TOKEN)
    assert repr(KEY.private) not in repr(TOKEN)

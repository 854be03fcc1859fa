"""Who may release models: what the root says, for a time, and takes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from propolis.protos import model_pb2
from propolis.secure.errors import Refusal, TrustError, UsageError
from propolis.secure.identity import Root, Roster, Signed, SigningKey, TrustedRoster
from propolis.secure.release import (
    CLOCK_SKEW_S,
    LONGEST_MODEL_NAME,
    Delegation,
    delegate,
    is_model_name,
    verify_delegation,
)
from propolis.secure.wire import decode

ROOT, KEY = Root(SigningKey.generate()), SigningKey.generate().public
ROSTER = Roster(ROOT.federation, 1, 2**40, ())


def verified(signed: Signed, roster: Roster = ROSTER) -> Delegation:
    return verify_delegation(ROOT.public_key, TrustedRoster(ROOT.public_key, ROOT.sign_roster(roster)), signed)


def test_a_delegation_says_which_key_when_and_for_what() -> None:
    found = verified(delegate(ROOT, 7, KEY, 10_000.5, 60, ("faces",)))
    assert (found.serial, found.public_key, found.models) == (7, KEY, ("faces",))
    assert (found.not_before, found.not_after) == (10_000 - CLOCK_SKEW_S, 10_060)
    found.require_valid(10_000 - CLOCK_SKEW_S)
    found.require_valid(10_060)
    for now in (10_000 - CLOCK_SKEW_S - 1, 10_060.5):
        with pytest.raises(TrustError) as caught:
            found.require_valid(now)
        assert caught.value.refusal is Refusal.RELEASE_KEY


def test_a_key_for_no_model_in_particular_is_for_all() -> None:
    verified(delegate(ROOT, 1, KEY, 0, 1)).require_model("anything")
    with pytest.raises(TrustError, match="is for faces, not for voices"):
        verified(delegate(ROOT, 1, KEY, 0, 1, ("faces",))).require_model("voices")


def test_the_largest_delegation_can_be_verified() -> None:
    names = tuple(f"{number:0{LONGEST_MODEL_NAME}}" for number in range(64))
    assert verified(delegate(ROOT, 2**62, KEY, 2**61, 1, names)).models == names
    with pytest.raises(UsageError, match="64 at most"):
        delegate(ROOT, 1, KEY, 0, 1, (*names, "another"))


def test_a_roster_revokes_keys_by_serial_and_says_so_under_the_roots_signature() -> None:
    signed = delegate(ROOT, 2, KEY, 0, 1)
    revoking = ROSTER.revoking_release(1).revoking_release(2)
    assert (revoking.number, revoking.revoked_releases) == (3, (1, 2))
    verified(signed, ROSTER.revoking_release(1))
    with pytest.raises(TrustError, match="release key 2 is revoked"):
        verified(signed, revoking)


def test_a_statement_of_another_kind_is_no_delegation() -> None:
    roster = ROOT.sign_roster(ROSTER)
    with pytest.raises(TrustError) as caught:
        verified(roster)
    assert caught.value.refusal is Refusal.RELEASE_KEY


@given(st.text(max_size=70))
def test_a_models_name_is_also_a_folders(name: str) -> None:
    if is_model_name(name):
        assert name == name.lower()
        assert name.isascii()
        assert not set(name) & set("/\\ \n\0:")
        assert name[0] != "."
        assert len(name) <= LONGEST_MODEL_NAME


@pytest.mark.parametrize("name", ["Faces", "a/b", "..", "", "a" * 65, "é", "a\n"])
def test_what_is_no_name_of_a_model_says_so(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a model"):
        delegate(ROOT, 1, KEY, 0, 1, (name,))


def test_a_delegation_is_what_was_signed() -> None:
    signed = delegate(ROOT, 3, KEY, 0, 1)
    assert decode(Delegation, signed.payload, model_pb2.Delegation) == verified(signed)

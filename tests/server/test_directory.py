"""What the server knows of its devices: who is behind which node, and what it has told them of each other."""

from __future__ import annotations

from dataclasses import replace
from sys import getsizeof

import pytest
from attacks.insiders import CHALLENGE, Founded, found, hello_of, refuses

from propolis.secure.errors import Refusal
from propolis.secure.identity import Invitation, Signed, describe, fingerprint
from propolis.server.directory import Directory


def directory_of(founded: Founded) -> Directory:
    return Directory(founded.federation.verified_roster)


def cloned(founded: Founded, index: int, victim: int) -> Signed:
    """A member's descriptor that has the victim's signing key in place of its own."""
    entry, ours = founded.roster.entries[index], founded.federation
    invitation = Invitation(fingerprint(ours.root_key), index, entry.name, entry.public_key)
    key = ours.devices[victim].signing_key.public
    return describe(invitation, founded.invitations[index], key, ours.devices[index].own_descriptor.hpke_key)


def test_a_hello_that_is_relayed_under_a_cloned_signing_key_is_refused() -> None:
    founded = found()
    directory, said = directory_of(founded), hello_of(founded, 1)
    with refuses(Refusal.IDENTITY, "who says to be device 2 is not"):
        directory.take_hello(22, CHALLENGE, replace(said, descriptor=cloned(founded, 2, 1)))
    directory.take_hello(11, CHALLENGE, said)
    directory.take_hello(22, CHALLENGE, hello_of(founded, 2))
    assert directory.members([11, 22]) == {1: 11, 2: 22}


def told_of(directory: Directory, devices: int) -> list[int]:
    """Which devices it remembers to have told of somebody."""
    return [index for index in range(devices) if directory.told_of(index, range(devices))]


def test_who_was_told_longest_ago_is_told_again_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("propolis.server.directory._MOST_TOLD_BYTES", 3 * getsizeof(1 << 5))
    directory = directory_of(found())
    for index in (0, 1, 2, 0):
        directory.note_told(index, [5])
    assert told_of(directory, 6) == [0, 1, 2]
    directory.note_told(3, [4, 5])
    assert told_of(directory, 6) == [0, 2, 3]
    for _ in range(5):  # what is forgotten leaves its room to others
        directory.forget_told(2)
        directory.note_told(2, [5])
    directory.forget_told(4)
    assert told_of(directory, 6) == [0, 2, 3]
    directory.note_told(0, [3])
    assert directory.told_of(0, range(6)) == {3, 5}
    directory.note_told(4, [3])
    assert told_of(directory, 6) == [0, 2, 4]


def test_what_is_remembered_of_the_largest_federation_is_bounded() -> None:
    directory, last = directory_of(found()), 2**20 - 1
    for index in range(500):
        directory.note_told(index, [last])
    kept = [index for index in range(500) if directory.told_of(index, [last])]
    assert kept == list(range(500 - len(kept), 500))
    assert 2**25 < len(kept) * getsizeof(1 << last) <= 2**26

"""A device is told of a peer once: from then on the server may send a prekey alone, and can't make more of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from attacks.insiders import Founded, found, refuses, signed_prekey
from protocol import Cohort, Round

from propolis.protos import identity_pb2
from propolis.secure.errors import Refusal
from propolis.secure.identity import Prekey, Signed, SigningKey, TrustedRoster, agreement_key
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.messages import PrepareReply, PrepareRequest, from_bytes, to_bytes
from propolis.secure.secagg.peers import Acquaintances
from propolis.secure.wire import decode

PEERS = (1, 2, 3)


def acquainted(founded: Founded | None = None) -> Cohort:
    """Four devices; device 0 has prepared with the others once."""
    cohort = (founded or found()).cohort()
    ask(cohort.round())
    return cohort


def brief(attempt: Round) -> PrepareRequest:
    """What device 0 is asked for when the server remembers that it knows all its peers."""
    return attempt.server.prepare_request(0, PEERS)


def ask(attempt: Round, request: PrepareRequest | None = None, device: Device | None = None) -> PrepareReply:
    data = to_bytes(request or attempt.server.prepare_request(0))
    return from_bytes(PrepareReply, (device or attempt.cohort.device(0)).prepare(data))


def test_a_request_to_a_device_that_knows_its_peers_has_prekeys_alone() -> None:
    attempt = acquainted().round(number=2)
    assert (len(brief(attempt).prekeys), brief(attempt).descriptors) == (3, ())
    attempt.server.receive_prepare(0, ask(attempt, brief(attempt)))
    for index in PEERS:
        assert len(attempt.server.prepare_request(index, (0,)).descriptors) == 2


@pytest.mark.parametrize("told_of", [(), (1,), (2, 3), (1, 2, 3)], ids=str)
def test_what_a_device_knows_may_be_told_again(told_of: tuple[int, ...]) -> None:
    attempt = acquainted().round(number=2)
    assert ask(attempt, attempt.server.prepare_request(0, told_of)).deliveries


def test_peers_are_remembered_after_a_restart() -> None:
    cohort = acquainted()
    attempt = cohort.round(number=2)
    restarted = DeviceState.from_bytes(cohort.federation.devices[0].to_bytes())
    assert restarted.peers == cohort.federation.devices[0].peers
    assert ask(attempt, brief(attempt), Device(restarted, cohort.policy, cohort.now)).deliveries


@pytest.mark.parametrize("told_of", [(1,), (1, 2, 3)], ids=str)
def test_a_device_says_when_it_does_not_know_a_peer_and_then_takes_all_in_the_same_attempt(
    told_of: tuple[int, ...],
) -> None:
    attempt = found().cohort().round()
    before = attempt.cohort.federation.devices[0].to_bytes()
    with refuses(Refusal.UNKNOWN_PEER, "no descriptor of device 1"):
        ask(attempt, attempt.server.prepare_request(0, told_of))
    assert attempt.cohort.federation.devices[0].to_bytes() == before  # nothing is remembered of a refused request
    attempt.server.receive_prepare(0, ask(attempt))


def test_a_device_that_lost_its_memory_of_a_peer_says_so() -> None:
    cohort = acquainted()
    attempt = cohort.round(number=2)
    del cohort.federation.devices[0].peers[2]
    with refuses(Refusal.UNKNOWN_PEER, "no descriptor of device 2"):
        ask(attempt, brief(attempt))
    assert ask(attempt).deliveries


def test_a_peer_is_remembered_only_once_the_device_has_prepared_with_it() -> None:
    """A request that is refused for its last prekey has introduced nobody."""
    attempt = found().cohort().round()
    request = attempt.server.prepare_request(0)
    forged = replace(request.prekeys[2], signature=bytes(64))
    with refuses(Refusal.KEYS):
        ask(attempt, replace(request, prekeys=(*request.prekeys[:2], forged)))
    with refuses(Refusal.UNKNOWN_PEER):
        ask(attempt, brief(attempt))


def test_a_remembered_peer_that_is_revoked_is_refused() -> None:
    founded = found()
    cohort = acquainted(founded)
    cohort.signed_roster = founded.root.sign_roster(founded.roster.revoking(1))
    for index in range(4):
        cohort.hello(index)
    plan = cohort.plan(number=2).to_bytes()
    number = cohort.federation.devices[0].prekey_number
    prekeys = tuple(cohort.hello(index).prekey for index in PEERS)
    with refuses(Refusal.IDENTITY, "revoked"):
        cohort.device(0).prepare(to_bytes(PrepareRequest(plan, number, prekeys, ())))


def test_a_revoked_peer_is_no_acquaintance_whatever_the_cohort_says() -> None:
    """The plan's cohort is checked before; what is remembered does not rely on it."""
    founded = found()
    cohort = acquainted(founded)
    revoked = TrustedRoster(founded.root.public_key, founded.root.sign_roster(founded.roster.revoking(1)))
    request, known = brief(cohort.round(number=2)), cohort.federation.devices[0].peers
    assert list(Acquaintances(cohort.roster, known).peers(PEERS, request)) == list(PEERS)
    with refuses(Refusal.IDENTITY, "revoked"):
        Acquaintances(revoked, known).peers(PEERS, request)


def test_a_remembered_peer_whose_place_was_given_to_another_invitation_is_refused() -> None:
    """Its descriptor is no longer a member's: not from memory, and not when it comes again."""
    founded = found()
    cohort = acquainted(founded)
    entries = list(founded.roster.entries)
    entries[1] = replace(entries[1], public_key=SigningKey.generate().public)
    roster = replace(founded.roster, number=founded.roster.number + 1, entries=tuple(entries))
    cohort.signed_roster = founded.root.sign_roster(roster)
    keys = [cohort.hello(index) for index in range(4)]
    plan = cohort.plan(number=2).to_bytes()
    number, prekeys = decode_prekey(keys[0].prekey).number, tuple(each.prekey for each in keys[1:])
    with refuses(Refusal.UNKNOWN_PEER, "no descriptor of device 1"):
        cohort.device(0).prepare(to_bytes(PrepareRequest(plan, number, prekeys, ())))
    with refuses(Refusal.IDENTITY, "does not hold"):
        told = PrepareRequest(plan, number, prekeys, (keys[1].descriptor,))
        cohort.device(0).prepare(to_bytes(told))


def decode_prekey(signed: Signed) -> Prekey:
    return decode(Prekey, signed.payload, identity_pb2.Prekey)


def forged_prekey(attempt: Round, signer: int, **changes: object) -> Signed:
    prekey = decode_prekey(attempt.server.keys_of(1).prekey)
    return signed_prekey(attempt.cohort, signer, replace(prekey, public_key=agreement_key()[1], **changes), index=1)


FORGED: dict[str, tuple[Refusal, Callable[[Round], tuple[Signed, ...]]]] = {
    "signed by another device": (Refusal.KEYS, lambda a: (forged_prekey(a, 2), *brief(a).prekeys[1:])),
    "used before": (Refusal.KEYS, lambda a: (forged_prekey(a, 1, number=1), *brief(a).prekeys[1:])),
    "of low order": (
        Refusal.KEYS,
        lambda a: (
            signed_prekey(a.cohort, 1, Prekey(decode_prekey(a.server.keys_of(1).prekey).number, bytes(32))),
            *brief(a).prekeys[1:],
        ),
    ),
    "in another order": (Refusal.KEYS, lambda a: brief(a).prekeys[::-1]),
    "one twice": (Refusal.KEYS, lambda a: (brief(a).prekeys[0], *brief(a).prekeys[:2])),
    "one less": (Refusal.SETS, lambda a: brief(a).prekeys[:2]),
    "one more": (Refusal.SETS, lambda a: (*brief(a).prekeys, brief(a).prekeys[0])),
    "none": (Refusal.SETS, lambda a: ()),
}


@pytest.mark.parametrize(("refusal", "forge"), FORGED.values(), ids=FORGED)
def test_prekeys_without_descriptors_are_held_to_what_is_remembered(
    refusal: Refusal, forge: Callable[[Round], tuple[Signed, ...]]
) -> None:
    attempt = acquainted().round(number=2)
    with refuses(refusal):
        ask(attempt, replace(brief(attempt), prekeys=forge(attempt)))
    assert ask(attempt, brief(attempt)).deliveries


@pytest.mark.parametrize("what", ["of no neighbour", "twice", "of the device itself"])
def test_descriptors_are_of_neighbours_and_come_once(what: str) -> None:
    cohort = found(5).cohort()
    attempt = cohort.round(cohort=range(4))
    request, stranger = attempt.server.prepare_request(0), cohort.hello(4).descriptor
    more = {"of no neighbour": stranger, "twice": request.descriptors[0]}.get(what, cohort.hello(0).descriptor)
    number = cohort.federation.devices[0].prekey_number
    with refuses(Refusal.SETS, "not one each"):
        ask(attempt, replace(request, prekey_number=number, descriptors=(*request.descriptors, more)))

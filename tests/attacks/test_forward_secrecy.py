"""Who records all traffic and seizes all devices after a round has closed opens no box of it.

A round closes for a device when it has unmasked, or at the next one that it accepts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from protocol import Cohort, Round

from propolis.protos import identity_pb2, secagg_pb2
from propolis.secure.envelope import open_sealed
from propolis.secure.errors import PeerError
from propolis.secure.identity import Prekey, Signed, descriptor_digest
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.masks import box_info, public_half
from propolis.secure.secagg.messages import BOX_BYTES, PrepareReply, from_bytes
from propolis.secure.secagg.preparation import records_of
from propolis.secure.shamir import SECRET_BYTES
from propolis.secure.wire import decode

DEVICES = 3
KEY_BYTES = 32


@dataclass
class Attacker:
    """Sees every byte that travels in a round, as `Round.meddle`."""

    attempt: Round
    traffic: list[bytes] = field(default_factory=list)
    boxes: list[tuple[bytes, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.attempt.meddle = self.record

    def record(self, step: str, index: int, data: bytes) -> bytes:
        self.traffic.append(data)
        if step == "prepare reply":
            records = records_of(from_bytes(PrepareReply, data).deliveries)
            for holder, record in zip(self.attempt.terms.neighbours(index), records, strict=True):
                self.boxes.append((record[:BOX_BYTES], self._context(index, holder)))
        return data

    @property
    def prekeys(self) -> set[bytes]:
        """The public keys that the round's boxes are sealed to."""
        members = self.attempt.server._members.values()
        return {prekey_of(member.keys.prekey).public_key for member in members}

    def opened(self, keys: Iterable[bytes]) -> int:
        """How many boxes open with any of these private keys."""
        keys = list(keys)
        return sum(any(opens(box, key, info) for key in keys) for box, info in self.boxes)

    def _context(self, dealer: int, holder: int) -> bytes:
        ends = ((i, descriptor_digest(self.attempt.server._members[i].keys.descriptor)) for i in (dealer, holder))
        return box_info(*(part for end in ends for part in end), self.attempt.terms.digest)


def prekey_of(signed: Signed) -> Prekey:
    return decode(Prekey, signed.payload, identity_pb2.Prekey)


def opens(box: bytes, key: bytes, info: bytes) -> bool:
    try:
        open_sealed(box, key, info)
    except PeerError:
        return False
    return True


def stored(cohort: Cohort) -> list[bytes]:
    return [device.to_bytes() for device in cohort.federation.devices]


def keys_by_name(states: Iterable[bytes]) -> set[bytes]:
    """Every X25519 private key that a state has a field for."""
    found: set[bytes] = set()
    for data in states:
        state = DeviceState.from_bytes(data)
        under_way = secagg_pb2.ClientState.FromString(state.round)
        found |= {state.prekey_private, state.hpke_private, under_way.prekey_private}
    return found - {b""}


def keys_anywhere(attacker: Attacker, seized: Iterable[bytes]) -> set[bytes]:
    """Every 32 bytes in a row that are the private half of one of the round's prekeys."""
    windows = {data[at : at + KEY_BYTES] for data in seized for at in range(len(data) - KEY_BYTES + 1)}
    prekeys = attacker.prekeys
    return {window for window in windows if public_half(window) in prekeys}


def a_round(cohort: Cohort, number: int = 1, **changes: object) -> Attacker:
    attacker = Attacker(cohort.round(number=number, **changes))
    attacker.attempt.prepare()
    return attacker


def finish(attacker: Attacker, malicious: bool = False) -> None:
    attacker.attempt.upload()
    attacker.attempt.server.close_uploads()
    if malicious:
        attacker.attempt.confirm()
    attacker.attempt.unmask()
    assert not attacker.attempt.refused


# Positive control: the search finds the keys while they are there.


@pytest.mark.parametrize("uploaded", [False, True], ids=["after prepare", "after upload"])
def test_before_a_round_closes_seized_devices_open_every_box(uploaded: bool) -> None:
    cohort = Cohort(DEVICES)
    attacker = a_round(cohort)
    if uploaded:
        attacker.attempt.upload()
    assert len(attacker.boxes) == DEVICES * (DEVICES - 1)
    assert attacker.opened(keys_by_name(stored(cohort))) == len(attacker.boxes)
    assert attacker.opened(keys_anywhere(attacker, stored(cohort))) == len(attacker.boxes)


def test_after_unmask_seized_devices_open_no_box() -> None:
    cohort = Cohort(DEVICES)
    attacker = a_round(cohort)
    finish(attacker)
    assert attacker.opened(keys_by_name(stored(cohort))) == 0
    assert keys_anywhere(attacker, stored(cohort)) == set()


# "abandoned" rounds never got past prepare.


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("finished", [False, True], ids=["abandoned", "finished"])
def test_after_a_round_has_closed_seized_devices_open_no_box(finished: bool, malicious: bool) -> None:
    cohort = Cohort(DEVICES)
    attacker = a_round(cohort, malicious=malicious)
    if finished:
        finish(attacker, malicious)
    after = a_round(cohort, number=2)
    assert not after.attempt.refused
    states = stored(cohort)
    assert attacker.opened(keys_by_name(states)) == 0
    assert keys_anywhere(attacker, [*states, *attacker.traffic, *after.traffic]) == set()


def test_the_traffic_alone_opens_no_box() -> None:
    cohort = Cohort(DEVICES)
    attacker = a_round(cohort)
    finish(attacker)
    assert keys_anywhere(attacker, attacker.traffic) == set()


@pytest.mark.parametrize("finished", [False, True], ids=["abandoned", "finished"])
def test_no_secret_of_a_closed_round_is_left_in_any_state(finished: bool) -> None:
    cohort = Cohort(DEVICES)
    attacker = a_round(cohort)
    rounds = [secagg_pb2.ClientState.FromString(device.round) for device in cohort.federation.devices]
    secrets = [secret for state in rounds for secret in (state.prekey_private, state.mask_secret, state.seed)]
    assert all(any(secret in state for state in stored(cohort)) for secret in secrets)
    if finished:
        finish(attacker)
    a_round(cohort, number=2)
    assert not any(secret in state for state in stored(cohort) for secret in secrets)


def test_what_masks_were_made_of_is_gone_after_upload() -> None:
    cohort = Cohort(DEVICES)
    attacker = a_round(cohort)
    rounds = [secagg_pb2.ClientState.FromString(device.round) for device in cohort.federation.devices]
    attacker.attempt.upload()
    secrets = [secret for state in rounds for secret in (state.mask_secret, state.seed)]
    assert all(len(secret) == SECRET_BYTES for secret in secrets)
    assert not any(secret in state for state in stored(cohort) for secret in secrets)


def test_a_device_that_was_silent_gives_up_its_prekey_at_the_next_hello() -> None:
    cohort = Cohort(DEVICES)
    attacker = Attacker(cohort.round())
    attacker.attempt.prepare(silent=(1,))
    silent = cohort.federation.devices[1]
    assert attacker.opened({silent.prekey_private}) == DEVICES - 1
    cohort.hello(1)
    assert attacker.opened(keys_by_name([silent.to_bytes()])) == 0
    assert keys_anywhere(attacker, [silent.to_bytes()]) == set()


def test_a_refused_round_closes_nothing() -> None:
    cohort = Cohort(DEVICES)
    attacker = a_round(cohort)
    again = cohort.round(number=0)
    before = stored(cohort)
    again.prepare()
    assert set(again.refused) == set(range(DEVICES))
    assert stored(cohort) == before
    finish(attacker)

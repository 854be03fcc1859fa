"""What an attacker may hold: the root's and the devices' private keys, to sign whatever the test wants signed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from protocol import Cohort, Round, asking

from propolis.protos import identity_pb2, secagg_pb2
from propolis.secure import labels
from propolis.secure.errors import Refusal, RefusedError
from propolis.secure.identity import (
    Prekey,
    Root,
    Roster,
    Signed,
    SigningKey,
    fingerprint,
    prekey_context,
    sign,
)
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.messages import Head, HelloReply, HelloRequest, NeighbourKeys, from_bytes, to_bytes
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.preparation import head_context
from propolis.secure.wire import decode
from propolis.simulations.federation import Federation

YEAR_S = 365 * 24 * 3600
CHALLENGE = b"c" * 32


@dataclass(frozen=True)
class Founded:
    """A federation whose root and invitation keys the test keeps."""

    root: Root
    roster: Roster
    invitations: tuple[SigningKey, ...]
    federation: Federation

    def cohort(self) -> Cohort:
        return Cohort(len(self.invitations), federation=self.federation)


def found(devices: int = 4) -> Founded:
    root = Root(SigningKey.generate())
    roster, keys, states = Roster(root.federation, 1, int(time.time()) + YEAR_S, ()), [], []
    for index in range(devices):
        roster, invitation, key = root.invite(roster, f"device-{index}")
        keys.append(key)
        states.append(DeviceState.enrolled(root.public_key, invitation, key))
    federation = Federation(root, root.sign_roster(roster), tuple(states))
    return Founded(root, roster, tuple(keys), federation)


@contextmanager
def refuses(refusal: Refusal, match: str | None = None) -> Iterator[None]:
    with pytest.raises(RefusedError, match=match) as caught:
        yield
    assert caught.value.refusal is refusal


def signing_key(cohort: Cohort, index: int) -> bytes:
    return cohort.federation.devices[index].signing_key.private


def read_head(signed: Signed) -> Head:
    return decode(Head, signed.payload, secagg_pb2.Head)


def signed_head(
    attempt: Round,
    signer: int,
    head: Head,
    label: bytes = labels.HEAD,
    *,
    index: int | None = None,
    plan: bytes | None = None,
) -> Signed:
    """A head of the signer for this attempt; or one that is signed as another device's, or for another plan."""
    context = head_context(signer if index is None else index, plan or attempt.terms.digest)
    return sign(label, signing_key(attempt.cohort, signer), head, secagg_pb2.Head, *context)


def signed_prekey(
    cohort: Cohort,
    signer: int,
    prekey: Prekey,
    label: bytes = labels.PREKEY,
    *,
    index: int | None = None,
    federation: bytes | None = None,
) -> Signed:
    """A prekey of the signer; or one that is signed as another device's, or another federation's."""
    ours = fingerprint(cohort.federation.root_key)
    context = prekey_context(federation or ours, signer if index is None else index)
    return sign(label, signing_key(cohort, signer), prekey, identity_pb2.Prekey, *context)


def prepare_with(attempt: Round, index: int, forge: Callable[[int, NeighbourKeys], Any]) -> bytes:
    """A device's prepare request, with the keys of each neighbour replaced; None leaves it out."""
    request = attempt.server.prepare_request(index)
    forged = (forge(other, attempt.server.keys_of(other)) for other in others(attempt, index))
    return to_bytes(asking(request.plan, request.prekey_number, [keys for keys in forged if keys is not None]))


def upload_with(attempt: Round, index: int, forge: Callable[[Signed], Any]) -> bytes:
    """A device's upload request, with the head of its first neighbour replaced."""
    request = attempt.server.upload_request(index)
    return to_bytes(replace(request, heads=(forge(request.heads[0]), *request.heads[1:])))


def others(attempt: Round, index: int) -> tuple[int, ...]:
    return attempt.terms.neighbours(index)


def hello_of(founded: Founded, index: int) -> HelloReply:
    """What a device answers to a server that asks who it is, by `CHALLENGE`."""
    request = to_bytes(HelloRequest(founded.federation.roster, CHALLENGE))
    return from_bytes(HelloReply, Device(founded.federation.devices[index], Policy(), 0.0).hello(request))

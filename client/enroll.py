"""A device joins its federation: keys made here, a place asked for, and the answer checked before it is believed.

Whatever the instant of a crash, the same command again goes on with the same keys: they are written before anything is
sent, and `client.toml`, which says that the device is a member, is written last.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from propolis.client.config import SETTINGS_FILE
from propolis.client.hybrid import announcement_by
from propolis.client.introduction import Introduction
from propolis.client.seal import Seal
from propolis.client.state import STATE_FILE, FileStore
from propolis.link.address import Address
from propolis.link.certificates import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    DeviceName,
    Tls,
    fault_of,
    new_tls_key,
    parse_certificate,
    signing_request,
    to_pem,
)
from propolis.link.enrolment import EnrollReply, EnrollRequest, prove
from propolis.link.keys import encode_private_key, load_tls_key, save_private_key
from propolis.link.token import Token
from propolis.secure.errors import PropolisError, Refusal, TrustError, UsageError
from propolis.secure.identity import Invitation, Signed, descriptor_digest, trusted_roster, verify_descriptor
from propolis.secure.kem import has_hybrid
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy
from propolis.storage import locked, write_atomically

LOCK_FILE = "enroll.lock"  # two at once would make a key, and keep a certificate, each of its own


@dataclass(frozen=True, slots=True)
class Enrolling:
    """What a device is told.

    Attributes:
        server: where enrolment is.
        token: that the federation's root made.
        folder: the device's.
        passphrase: encrypts its keys.
        timeout: seconds to wait for the server, all in all.
        require_offline_root: refuse a federation that keeps its root key on the server.
    """

    server: Address
    token: Token
    folder: Path
    passphrase: bytes | None = field(default=None, repr=False)
    timeout: float = 30.0
    require_offline_root: bool = False


def enroll(asked: Enrolling) -> Invitation:
    """Join, and leave in the folder what `client run` needs.

    Returns:
        The place that is the device's now.

    Raises:
        UsageError: in one line, whatever went wrong: the token, the folder, the connection, the server's refusal, or an
            answer that does not hold.
    """
    invitation = asked.token.verified()
    if invitation.root_online and asked.require_offline_root:
        raise UsageError("this federation keeps its root key on the server, which --require-offline-root refuses")
    asked.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(asked.folder / LOCK_FILE):
        if (asked.folder / SETTINGS_FILE).exists():
            raise UsageError(f"{asked.folder} is enrolled already: use another folder for another device")
        _join(asked, invitation)
    return invitation


def _join(asked: Enrolling, invitation: Invitation) -> None:
    """Ask for the place with keys of this device, and keep the answer."""
    device = _Device(asked, invitation)
    with Introduction(asked.server, asked.token.authority, asked.timeout) as introduction:
        reply = introduction.enroll(device.request(int(time.time())))
        authority = introduction.authority
    try:
        device.accept(reply, authority)
    except (PropolisError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the server's answer does not hold, and was not kept: {error}") from None


class _Device:
    """The keys of a device that is about to join, on the disk before anything else happens."""

    def __init__(self, asked: Enrolling, invitation: Invitation) -> None:
        self._asked = asked
        self._invitation = invitation
        self._seal = None if asked.passphrase is None else Seal(asked.passphrase)
        self._state = self._own_state()
        self._key = self._own_key()

    def request(self, clock: int) -> EnrollRequest:
        """What is sent: public keys, and proofs of having their private halves."""
        state, csr = self._state, signing_request(self._key)
        proof = prove(state.signing_key, state.own_descriptor, csr, clock)
        invitation, announced = self._asked.token.invitation, self._announcement()
        return EnrollRequest(invitation, state.descriptor, csr, clock, proof, announcement=announced)

    def _announcement(self) -> Signed | None:
        """Of the device's hybrid key; without ML-KEM on this machine it enrols without one."""
        return announcement_by(self._state, self._asked.folder, self._seal) if has_hybrid() else None

    def accept(self, reply: EnrollReply, authority: bytes) -> None:
        """Check an answer, and keep it.

        Raises:
            TrustError, ValueError: it is not about this device, or not the authority's, or not the root's.
            StorageError: it could not be kept.
        """
        tls = Tls(encode_private_key(self._key), to_pem(parse_certificate(reply.certificate)), authority)
        self._require_own(tls)
        self._require_in_roster(reply)
        link = Address.parse(reply.link_address, default_host=self._asked.server.host)
        folder = self._asked.folder
        write_atomically(folder / AUTHORITY_FILE, tls.authority)
        write_atomically(folder / CERTIFICATE_FILE, tls.certificate)
        FileStore(folder, Policy(), self._seal).change(lambda device: device.take_roster(reply.roster))
        write_atomically(folder / SETTINGS_FILE, tomli_w.dumps({"server": str(link)}).encode())

    def _require_own(self, tls: Tls) -> None:
        if fault := fault_of(tls, time.time()):
            raise TrustError(Refusal.IDENTITY, fault)
        digest = descriptor_digest(self._state.descriptor)
        expected = DeviceName(self._invitation.federation, self._invitation.index, digest)
        if DeviceName.of(tls.certificate) != expected:
            raise TrustError(Refusal.IDENTITY, "the certificate is another device's")

    def _require_in_roster(self, reply: EnrollReply) -> None:
        roster = trusted_roster(self._asked.token.root_key, reply.roster)
        roster.require_current(time.time())
        if roster.require_member(self._invitation.index).public_key != self._invitation.public_key:
            raise TrustError(Refusal.IDENTITY, "the roster has another device in this one's place")

    def _own_state(self) -> DeviceState:
        """New keys, or those of an interrupted run with the same token."""
        folder, token = self._asked.folder, self._asked.token
        if not (folder / STATE_FILE).exists():
            state = DeviceState.enrolled(token.root_key, token.invitation, token.key)
            FileStore.create(folder, state, self._seal)
        state = FileStore(folder, Policy(), self._seal).change(lambda device: device.state)
        try:
            verify_descriptor(self._invitation, state.descriptor)
        except PropolisError:
            raise UsageError(f"{folder} has the keys of another token: use a new folder") from None
        return state

    def _own_key(self) -> EllipticCurvePrivateKey:
        path = self._asked.folder / KEY_FILE
        if not path.exists():
            save_private_key(path, new_tls_key(), self._asked.passphrase)
        return load_tls_key(path, self._asked.passphrase)

"""Keys of homomorphic encryption: who makes them, what the server gets of them, and how a device gets the rest.

The root delegates a key holder, never the server. The holder makes a key and signs its id, which is a digest of all
that is public about it and of the federation. The public material commits to the secret part, so the box that a
device opens can hold nothing but what the holder signed: root -> holder -> statement -> key id -> material -> secret.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from propolis.protos import he_pb2 as pb
from propolis.secure import labels
from propolis.secure.envelope import OVERHEAD_BYTES, open_sealed, seal
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.he.bfv import Scheme
from propolis.secure.he.parameters import LARGEST_VALUE_BITS, MOST_CLIENTS, Parameters, choose
from propolis.secure.he.tag import MAC_KEY_BYTES
from propolis.secure.identity import (
    DIGEST_BYTES,
    KEY_BYTES,
    LARGEST_INDEX,
    Root,
    Signed,
    SigningKey,
    TrustedRoster,
    sign,
    verify,
)
from propolis.secure.release import LARGEST_NUMBER, lifetime, require_in_time, require_standing
from propolis.secure.wire import between, decode_exactly, encode, sized, version_field

# Of the largest degree, at the bits that security allows: two polynomials, and one.
_LARGEST_PUBLIC_KEY, _LARGEST_SECRET = 2**19, 2**18
LARGEST_MATERIAL = _LARGEST_PUBLIC_KEY + 2**10
LARGEST_SEALED = OVERHEAD_BYTES + MAC_KEY_BYTES + _LARGEST_SECRET


@dataclass(frozen=True, slots=True)
class Holder:
    """What the root says of a key holder.

    Attributes:
        federation: fingerprint of the root, 32 bytes.
        serial: what a roster revokes it by; release keys have theirs from the same numbers.
        public_key: Ed25519, 32 bytes.
        not_before, not_after: seconds since 1970.
    """

    federation: bytes = sized(DIGEST_BYTES)
    serial: int = between(1, LARGEST_NUMBER)
    public_key: bytes = sized(KEY_BYTES)
    not_before: int = between(0, LARGEST_NUMBER)
    not_after: int = between(0, LARGEST_NUMBER)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class Statement:
    """What a holder says of a key; `number` rises with every key of the federation."""

    federation: bytes = sized(DIGEST_BYTES)
    number: int = between(1, LARGEST_NUMBER)
    key_id: bytes = sized(DIGEST_BYTES)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class Material:
    """All that is public about a key, which is all that a server needs.

    Attributes:
        clients, value_bits, seeded: what the parameters are chosen for.
        parameters: their digest, so that two versions that choose differently notice.
        public_key: empty where devices encrypt under the secret key.
        secret_commitment: digest of MAC key and secret key.
        masked: whether devices encrypt under masks only.
    """

    clients: int = between(1, MOST_CLIENTS)
    value_bits: int = between(1, LARGEST_VALUE_BITS)
    parameters: bytes = sized(DIGEST_BYTES)
    public_key: bytes = sized(0, _LARGEST_PUBLIC_KEY)
    secret_commitment: bytes = sized(DIGEST_BYTES)
    seeded: bool = False
    masked: bool = False
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class SealedKey:
    """The secret part of a key for one device."""

    key_id: bytes = sized(DIGEST_BYTES)
    index: int = between(0, LARGEST_INDEX)
    sealed: bytes = sized(OVERHEAD_BYTES + MAC_KEY_BYTES, LARGEST_SEALED)
    version: int = version_field()


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """The secret part of a key, which every device of the federation has.

    Attributes:
        mac_key: K, 32 bytes.
        secret_key: packed.
    """

    mac_key: bytes
    secret_key: bytes


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key as its server knows it, or a device that has checked where it comes from.

    Attributes:
        federation: fingerprint of the root, 32 bytes.
        material: the bytes that travel.
        parameters: that it is for.
        public_key: packed, or empty where there is none.
        secret_commitment: digest of its secret part.
        masked: whether devices encrypt under it under masks only.
    """

    federation: bytes
    material: bytes
    parameters: Parameters
    public_key: bytes
    secret_commitment: bytes
    masked: bool

    @property
    def key_id(self) -> bytes:
        """32 bytes that stand for this key of this federation."""
        return labels.digest(labels.HE_KEY, self.federation, self.material)

    @property
    def use(self) -> str:
        """Which updates go under it, in words."""
        return "updates under masks only" if self.masked else "updates with or without masks"


def delegate_holder(root: Root, serial: int, public_key: bytes, now: float, lifetime_s: int) -> Signed:
    """Let a key holder make keys.

    Args:
        root: of the federation.
        serial: that no other delegation of this root has, of release keys neither.
        public_key: of the holder, Ed25519, 32 bytes.
        now: seconds since 1970.
        lifetime_s: how long its keys are believed, in seconds.
    """
    holder = Holder(root.federation, serial, public_key, *lifetime(now, lifetime_s))
    return root.sign(labels.HE_HOLDER, holder, pb.Holder)


def verify_holder(root_key: bytes, roster: TrustedRoster, signed: Signed, now: float) -> Holder:
    """A key holder of this root, now.

    Args:
        root_key: of the federation, 32 bytes.
        roster: the newest that is known, which holds the revocations.
        signed: the delegation.
        now: seconds since 1970.

    Raises:
        TrustError: it is not this root's, of another federation, revoked, or for another time.
        PeerError: it is malformed.
    """
    holder = verify(labels.HE_HOLDER, root_key, signed, Holder, pb.Holder, Refusal.HE_KEY)
    require_standing(Refusal.HE_KEY, "the key holder", holder.federation, holder.serial, roster)
    require_in_time(Refusal.HE_KEY, f"the key holder {holder.serial}", holder.not_before, holder.not_after, now)
    return holder


def make_key(federation: bytes, scheme: Scheme, *, masked: bool = False) -> tuple[PublicKey, Secret]:
    """A new key of a federation.

    Args:
        federation: fingerprint of the root, 32 bytes.
        scheme: that it is for.
        masked: whether devices encrypt under masks only.
    """
    secret_key, public_key = scheme.generate()
    secret, chosen = Secret(os.urandom(MAC_KEY_BYTES), secret_key), scheme.parameters
    material = Material(
        chosen.clients,
        chosen.value_bits,
        chosen.digest,
        b"" if chosen.seeded else public_key,
        _commitment(secret),
        chosen.seeded,
        masked,
    )
    return read_material(federation, encode(material, pb.Material)), secret


def read_material(federation: bytes, data: bytes) -> PublicKey:
    """A key from its public material, which proves nothing yet.

    Raises:
        PeerError: the bytes are no such material, or that of a version that chooses other parameters.
    """
    if len(data) > LARGEST_MATERIAL:
        raise PeerError(Refusal.MALFORMED, f"a key's public material of {len(data)} bytes")
    material = decode_exactly(Material, data, pb.Material)
    parameters = choose(material.clients, material.value_bits, seeded=material.seeded)
    if parameters.digest != material.parameters:
        raise PeerError(Refusal.HE_KEY, "the key is for parameters that this version would not choose")
    if len(material.public_key) != (0 if material.seeded else parameters.public_key_bytes):
        raise PeerError(Refusal.MALFORMED, f"a public key of {len(material.public_key)} bytes")
    commitment = material.secret_commitment
    return PublicKey(federation, data, parameters, material.public_key, commitment, material.masked)


def state_key(holder_key: SigningKey, key: PublicKey, number: int) -> Signed:
    """Sign that a key is the federation's.

    Args:
        holder_key: of the key holder.
        key: from `make_key`.
        number: larger than that of the last key.
    """
    return sign(labels.HE_STATEMENT, holder_key.private, Statement(key.federation, number, key.key_id), pb.Statement)


def verify_key(holder: Holder, signed: Signed, key: PublicKey) -> int:
    """The number of a key that this holder made.

    Args:
        holder: that was verified.
        signed: its statement.
        key: whose material is to be believed.

    Raises:
        TrustError: it is another holder's, or of another key.
    """
    statement = verify(labels.HE_STATEMENT, holder.public_key, signed, Statement, pb.Statement, Refusal.HE_KEY)
    if (statement.federation, statement.key_id) != (holder.federation, key.key_id):
        raise TrustError(Refusal.HE_KEY, "the key holder's statement is of another key")
    return statement.number


def seal_key(key: PublicKey, secret: Secret, index: int, descriptor: bytes, hpke_key: bytes) -> bytes:
    """The secret part of a key for one device.

    Args:
        key: its public part.
        secret: its secret part.
        index: of the device in the roster.
        descriptor: digest of the device's, 32 bytes.
        hpke_key: of the device, public.

    Raises:
        PeerError: the public key is none.
    """
    sealed = seal(secret.mac_key + secret.secret_key, hpke_key, _sealing(key, descriptor))
    return encode(SealedKey(key.key_id, index, sealed), pb.SealedKey)


def open_key(data: bytes, key: PublicKey, descriptor: bytes, private: bytes) -> Secret:
    """The secret part of a key.

    Args:
        data: from `seal_key`.
        key: its public part, which `verify_key` has let pass.
        descriptor: digest of this device's, 32 bytes.
        private: this device's HPKE key.

    Raises:
        PeerError: the bytes are no sealed key.
        TrustError: it is another key, for another device, or not what the public part commits to.
    """
    sealed = decode_exactly(SealedKey, data, pb.SealedKey)
    if sealed.key_id != key.key_id:
        raise TrustError(Refusal.HE_KEY, "the sealed key is another one")
    try:
        opened = open_sealed(sealed.sealed, private, _sealing(key, descriptor))
    except PeerError:
        raise TrustError(Refusal.HE_KEY, "the sealed key does not open: it is another device's, or damaged") from None
    secret = Secret(opened[:MAC_KEY_BYTES], opened[MAC_KEY_BYTES:])
    if _commitment(secret) != key.secret_commitment:
        raise TrustError(Refusal.HE_KEY, "the sealed key is not the one that its public part commits to")
    return secret


def _commitment(secret: Secret) -> bytes:
    return labels.digest(labels.HE_SECRET, secret.mac_key, secret.secret_key)


def _sealing(key: PublicKey, descriptor: bytes) -> bytes:
    return labels.joined(labels.HE_SEALED, key.federation, key.key_id, descriptor)

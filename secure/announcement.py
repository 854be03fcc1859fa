"""A device's second key, the hybrid one, in its own words: invitation -> descriptor -> announcement.

A descriptor is signed once, with a key that its device then throws away, so a key that a device gets later is announced
by a statement of its own, under the descriptor's signing key. Who passes it on can keep it back, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from propolis.protos import model_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError
from propolis.secure.identity import (
    DIGEST_BYTES,
    Descriptor,
    Signed,
    SigningKey,
    descriptor_digest,
    require_contributory,
    sign,
    verify,
)
from propolis.secure.kem import HYBRID_PUBLIC_BYTES, X25519_BYTES, Kem, public_key
from propolis.secure.wire import sized, version_field


@dataclass(frozen=True, slots=True)
class Announcement:
    """A device's hybrid key, signed with the device's signing key.

    Attributes:
        federation: fingerprint of the root, 32 bytes.
        descriptor: digest of the device's, 32 bytes.
        hybrid_key: ML-KEM-768 and X25519, public, see `secure/kem.py`.
    """

    federation: bytes = sized(DIGEST_BYTES)
    descriptor: bytes = sized(DIGEST_BYTES)
    hybrid_key: bytes = sized(HYBRID_PUBLIC_BYTES)
    version: int = version_field()


def announce(signing_key: SigningKey, federation: bytes, descriptor: Signed, hybrid_key: bytes) -> Signed:
    """The announcement of a hybrid key, the same bytes for the same key.

    Args:
        signing_key: of the descriptor.
        federation: fingerprint of the root.
        descriptor: the device's.
        hybrid_key: public, 1,216 bytes.
    """
    announcement = Announcement(federation, descriptor_digest(descriptor), hybrid_key)
    return sign(labels.ANNOUNCEMENT, signing_key.private, announcement, pb.Announcement)


def verify_announcement(descriptor: Descriptor, digest: bytes, signed: Signed) -> bytes:
    """The hybrid key that the device of a descriptor has announced.

    Args:
        descriptor: that was verified.
        digest: `descriptor_digest` of it.
        signed: the announcement.

    Raises:
        TrustError: it is another device's or federation's, or no key that can be sealed to.
        PeerError: it is malformed.
        UsageError: there is no ML-KEM on this machine.
    """
    key, refusal = descriptor.signing_key, Refusal.KEYS
    announcement = verify(labels.ANNOUNCEMENT, key, signed, Announcement, pb.Announcement, refusal)
    if announcement.federation != descriptor.federation:
        raise TrustError(refusal, f"the hybrid key of device {descriptor.index} is for another federation")
    if announcement.descriptor != digest:
        raise TrustError(refusal, f"the hybrid key of device {descriptor.index} is for another descriptor")
    _require_key(announcement.hybrid_key, descriptor.index)
    return announcement.hybrid_key


def _require_key(hybrid_key: bytes, index: int) -> None:
    """Refuse what cannot be sealed to: one such key would stop a release to all devices."""
    require_contributory(hybrid_key[-X25519_BYTES:], index)
    try:
        public_key(Kem.MLKEM768_X25519, hybrid_key)
    except ValueError:
        raise TrustError(Refusal.KEYS, f"device {index} has announced a hybrid key that is none", index) from None

"""Sealing to a public key: HPKE (RFC 9180), base mode, X25519 / HKDF-SHA256 / AES-128-GCM, one message per key use.

`cryptography` offers no associated data here, so the whole context goes into `info`.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from propolis.secure.errors import PeerError, Refusal

KEY_BYTES = 32
# The encapsulated key and the tag.
OVERHEAD_BYTES = 32 + 16

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)


def seal(plaintext: bytes, public_key: bytes, info: bytes) -> bytes:
    """Encrypt to the holder of an X25519 key; `info` binds the context and must be known to the receiver.

    Raises:
        PeerError: the public key is not one.
    """
    try:
        return _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public_key), info=info)
    except ValueError:
        raise PeerError(Refusal.KEYS, "cannot seal to a key that is no X25519 public key") from None


def open_sealed(sealed: bytes, private_key: bytes, info: bytes) -> bytes:
    """Decrypt what `seal` made.

    Raises:
        PeerError: another key, another context, or not the bytes that were sealed.
    """
    try:
        return _SUITE.decrypt(sealed, X25519PrivateKey.from_private_bytes(private_key), info=info)
    except (InvalidTag, ValueError):
        raise PeerError(Refusal.SHARES, "a sealed message does not open under this key and context") from None

"""The keys that something can be sealed to, as bytes: of X25519, and of the hybrid of ML-KEM-768 and X25519.

Who would open what is sealed to a hybrid key must break both: ML-KEM-768 (FIPS 203), which no quantum computer is known
to break, and X25519 (RFC 7748), which is older and better known. How the two secrets become one is
draft-ietf-hpke-pq, MLKEM768-X25519, also called X-Wing.

A hybrid key is that of ML-KEM and then that of X25519: the public half 1,184 + 32 bytes, the private one 64 (the seed,
FIPS 203, section 6.1) + 32.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from propolis.secure import labels
from propolis.secure.errors import UsageError

X25519_BYTES = 32
HYBRID_PUBLIC_BYTES, HYBRID_PRIVATE_BYTES = 1184 + X25519_BYTES, 64 + X25519_BYTES
_TAG_BYTES = 16


class Kem(IntEnum):
    """A key encapsulation mechanism of HPKE, by the number that a manifest has for it."""

    X25519 = 1
    MLKEM768_X25519 = 2

    @property
    def overhead(self) -> int:
        """Bytes that sealing adds: the encapsulated key, and a tag."""
        return (X25519_BYTES if self is Kem.X25519 else 1088 + X25519_BYTES) + _TAG_BYTES


@cache
def has_hybrid() -> bool:
    """Whether the OpenSSL that `cryptography` was built with has ML-KEM; that of its wheels has."""
    try:
        MLKEM768PrivateKey.generate()
    except UnsupportedAlgorithm:
        return False
    return True


def require_hybrid() -> None:
    """Raise UsageError where there is no ML-KEM."""
    if not has_hybrid():
        raise UsageError("post-quantum keys need cryptography with ML-KEM (OpenSSL 3.5), which its wheels have")


def hybrid_key() -> tuple[bytes, bytes]:
    """A new hybrid key: private and public half, 96 and 1,216 bytes, from nothing but the system's randomness.

    Raises:
        UsageError: there is no ML-KEM on this machine.
    """
    require_hybrid()
    lattice, curve = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
    private = lattice.private_bytes_raw() + curve.private_bytes_raw()
    return private, hybrid_public(private)


def hybrid_public(private: bytes) -> bytes:
    """The public half of a hybrid key; raises as `private_key` does."""
    lattice, curve = _halves(private)
    return lattice.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()


def hybrid_digest(public: bytes) -> bytes:
    """32 bytes that stand for this very hybrid key."""
    return labels.digest(labels.HYBRID_KEY, public)


def public_key(kem: Kem, public: bytes) -> X25519PublicKey | hpke.MLKEM768X25519PublicKey:
    """A public key as `cryptography` has it.

    Raises:
        ValueError: it is none: another length, or not reduced (FIPS 203, section 7.2).
        UsageError: there is no ML-KEM on this machine.
    """
    if kem is Kem.X25519:
        return X25519PublicKey.from_public_bytes(public)
    require_hybrid()
    lattice, curve = public[:-X25519_BYTES], public[-X25519_BYTES:]
    return hpke.MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(lattice), X25519PublicKey.from_public_bytes(curve)
    )


def private_key(kem: Kem, private: bytes) -> X25519PrivateKey | hpke.MLKEM768X25519PrivateKey:
    """A private key as `cryptography` has it; raises as `public_key` does."""
    return X25519PrivateKey.from_private_bytes(private) if kem is Kem.X25519 else _hybrid(private)


def _hybrid(private: bytes) -> hpke.MLKEM768X25519PrivateKey:
    return hpke.MLKEM768X25519PrivateKey(*_halves(private))


def _halves(private: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    require_hybrid()
    lattice, curve = private[:-X25519_BYTES], private[-X25519_BYTES:]
    return MLKEM768PrivateKey.from_seed_bytes(lattice), X25519PrivateKey.from_private_bytes(curve)

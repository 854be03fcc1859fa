"""Sealing to a public key, and of a large content under a symmetric one.

To a key: HPKE (RFC 9180), base mode, X25519 / HKDF-SHA256 / AES-128-GCM, one message per key use; to a hybrid key (see
`secure/kem.py`) with AES-256-GCM, for quantum computers weaken symmetric keys too. `cryptography` offers no associated
data here, so the whole context goes into `info`.

A content: AES-256-GCM over chunks, STREAM (Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015, section 7): the nonce is
the chunk's number and whether it is the last one, so no chunk can be left out, moved, added or taken for the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.kem import X25519_BYTES, Kem, private_key, public_key

KEY_BYTES = X25519_BYTES
OVERHEAD_BYTES = Kem.X25519.overhead

CONTENT_KEY_BYTES = 32
# Of the plaintext; a chunk of ciphertext has the tag more.
CHUNK_BYTES, TAG_BYTES = 2**18, 16
SEALED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
_COUNTER_BYTES = 11

_SUITES = {
    Kem.X25519: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM),
    Kem.MLKEM768_X25519: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}
_NAMES = {Kem.X25519: "X25519", Kem.MLKEM768_X25519: "hybrid"}


def seal(plaintext: bytes, public: bytes, info: bytes, kem: Kem = Kem.X25519) -> bytes:
    """Encrypt to the holder of a key; `info` binds the context and must be known to the receiver.

    Raises:
        PeerError: the public key is not one of this kind.
    """
    try:
        return _SUITES[kem].encrypt(plaintext, public_key(kem, public), info=info)
    except ValueError:
        raise PeerError(Refusal.KEYS, f"cannot seal to a key that is no {_NAMES[kem]} public key") from None


def open_sealed(sealed: bytes, private: bytes, info: bytes, kem: Kem = Kem.X25519) -> bytes:
    """Decrypt what `seal` made.

    Raises:
        PeerError: another key, another context, or not the bytes that were sealed.
    """
    try:
        return _SUITES[kem].decrypt(sealed, private_key(kem, private), info=info)
    except (InvalidTag, ValueError):
        raise PeerError(Refusal.SHARES, "a sealed message does not open under this key and context") from None


def new_content_key() -> bytes:
    """A key for one content, 32 bytes; a second content under it would repeat nonces."""
    return os.urandom(CONTENT_KEY_BYTES)


def commit_to(content_key: bytes) -> bytes:
    """32 bytes that only this key has: AES-GCM alone lets one ciphertext open under two keys, to two contents."""
    return labels.digest(labels.CONTENT_KEY, content_key)


def chunk_count(plaintext_size: int) -> int:
    """How many chunks a content of this many bytes has; it has at least one byte."""
    return -(-plaintext_size // CHUNK_BYTES)


def sealed_size(plaintext_size: int) -> int:
    """Bytes of the ciphertext of a content."""
    return plaintext_size + TAG_BYTES * chunk_count(plaintext_size)


def seal_content(content_key: bytes, context: bytes, chunks: Iterable[bytes], count: int) -> Iterator[bytes]:
    """Encrypt a content chunk by chunk.

    Args:
        content_key: from `new_content_key`, used for nothing else.
        context: bound to every chunk, and known to the receiver.
        chunks: of the plaintext, `CHUNK_BYTES` each but for the last one.
        count: how many there are.
    """
    cipher = AESGCM(content_key)
    for number, chunk in enumerate(chunks):
        yield cipher.encrypt(_nonce(number, count), chunk, context)


def open_content(content_key: bytes, context: bytes, chunks: Iterable[bytes], count: int) -> Iterator[bytes]:
    """Decrypt what `seal_content` made; a chunk is authentic when it comes, the content when the last one has come.

    Raises:
        TrustError: another key, another context, or chunks that are not these `count` in their order.
    """
    cipher, opened = AESGCM(content_key), 0
    for number, chunk in enumerate(chunks):
        try:
            yield cipher.decrypt(_nonce(number, count), chunk, context)
        except InvalidTag:
            raise TrustError(Refusal.PACKAGE, f"chunk {number} of {count} does not open") from None
        opened += 1
    if opened != count:
        raise TrustError(Refusal.PACKAGE, f"the content has {opened} chunks in place of {count}")


def _nonce(number: int, count: int) -> bytes:
    return number.to_bytes(_COUNTER_BYTES, "big") + bytes([number == count - 1])

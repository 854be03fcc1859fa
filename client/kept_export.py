"""What a device has exported itself, as it lies in a slot: encrypted and authenticated under a key of its own.

magic, salt (32 bytes), then AES-256-GCM in chunks (see `secure/envelope.py`), bound to the device and the release; the
key is HKDF (RFC 5869) of the device's own private key and the salt. Who sealed the package has its content key, and can
neither read this nor put another file in its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from propolis.client.keyholder import Keyholder
from propolis.client.opening import Files, files_from, files_to
from propolis.secure.envelope import (
    CHUNK_BYTES,
    CONTENT_KEY_BYTES,
    SEALED_CHUNK_BYTES,
    chunk_count,
    open_content,
    seal_content,
)
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.labels import KEPT_EXPORT, joined

_MAGIC = b"propolis export\x01"
_SALT_BYTES = 32
_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES


def seal_export(device: Keyholder, release: bytes, files: Files) -> bytes:
    """Files as this device keeps them; `release` is the digest of the manifest."""
    salt, data = os.urandom(_SALT_BYTES), files_to(files)
    key = _key(device, salt)
    return b"".join((_MAGIC, salt, *seal_content(key, _context(device, release), _cut(data, CHUNK_BYTES),
                                                 chunk_count(len(data)))))  # fmt: skip


def open_export(device: Keyholder, release: bytes, kept: bytes) -> dict[str, bytes]:
    """What `seal_export` was given.

    Raises:
        PeerError, TrustError: it is damaged, or another device's or release's.
    """
    header, body = kept[:_HEADER_BYTES], kept[_HEADER_BYTES:]
    if len(header) != _HEADER_BYTES or not header.startswith(_MAGIC):
        raise PeerError(Refusal.PACKAGE, "what the device has exported is damaged")
    chunks = list(_cut(body, SEALED_CHUNK_BYTES))
    key = _key(device, header[len(_MAGIC) :])
    return files_from(b"".join(open_content(key, _context(device, release), chunks, len(chunks))))


def _key(device: Keyholder, salt: bytes) -> bytes:
    return HKDF(SHA256(), CONTENT_KEY_BYTES, salt, KEPT_EXPORT).derive(device.hpke_private)


def _context(device: Keyholder, release: bytes) -> bytes:
    return joined(KEPT_EXPORT, device.descriptor, release)


def _cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))

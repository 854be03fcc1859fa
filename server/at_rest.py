"""Models as they lie in storage: AES-256-GCM in chunks, under a key of each blob's own.

A blob is a header and chunks. The header is the magic, the version, the chunk size and a random salt; the blob's key
is HKDF(registry's key, salt), so that a chunk's nonce is its number and a flag that says "the last one", and no two
blobs share a nonce however many there are. This is STREAM of Hoang, Reyhanitabar, Rogaway and Vizar ("Online
authenticated-encryption and its nonce-reuse misuse-resistance", CRYPTO 2015) as Tink's AES-GCM-HKDF does it: chunks
cannot be reordered, left out or cut off at the end. Header and the plaintext's digest are authenticated with every
chunk, so a blob put in another one's place is refused before any of it is read.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from propolis.secure.errors import UsageError
from propolis.secure.labels import BLOB, BLOB_NAME, REGISTRY_KEY, REGISTRY_ROW, RELEASED_KEY, joined

KEY_BYTES = 32
CHUNK_BYTES = 2**20
_MAGIC, _VERSION = b"PRPB", 1
_HEADER = struct.Struct(">4sBI32s")
_SALT_BYTES, _TAG_BYTES = 32, 16
_LARGEST_CHUNK = 2**26


class Reader(Protocol):
    """An open file, as far as it is read here."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; fewer than asked for only at the end."""


@dataclass(frozen=True, slots=True, repr=False)
class RegistryKey:
    """The 32 bytes that everything in a registry is encrypted under."""

    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise UsageError(f"a registry's key has {KEY_BYTES} bytes, not {len(self.secret)}")

    def name_of(self, digest: bytes) -> str:
        """The name of the blob with this plaintext.

        Keyed, because whoever lists the storage could otherwise tell whether a model that they have is in it; and of
        the plaintext, because the ciphertext is another one each time and the same model would be stored twice.
        """
        return self._derive(BLOB_NAME, digest).hex()

    def check(self) -> str:
        """What tells this key from another one, and says nothing of it."""
        return self._derive(REGISTRY_KEY, b"")[:16].hex()

    def cipher(self, salt: bytes) -> AESGCM:
        """The cipher of one blob."""
        return AESGCM(self._derive(BLOB, salt))

    def seal_released(self, content_key: bytes, manifest: bytes) -> bytes:
        """The content key of a release as it is kept: under a key of its own, bound to the manifest's digest."""
        salt = os.urandom(_SALT_BYTES)
        cipher = AESGCM(self._derive(RELEASED_KEY, salt))
        return salt + cipher.encrypt(_nonce(0, True), content_key, manifest)

    def open_released(self, kept: bytes, manifest: bytes) -> bytes:
        """What `seal_released` was given; raises UsageError where it is damaged or another release's."""
        cipher = AESGCM(self._derive(RELEASED_KEY, kept[:_SALT_BYTES]))
        try:
            return cipher.decrypt(_nonce(0, True), kept[_SALT_BYTES:], manifest)
        except (InvalidTag, ValueError):
            raise UsageError("the content key of this release is damaged, or another one's") from None

    def code_of(self, *fields: object) -> str:
        """What tells that these were put together by who has the key: an HMAC-SHA256, in hexadecimal."""
        said = joined(REGISTRY_ROW, *(str(field).encode() for field in fields))
        return hmac.digest(self._derive(REGISTRY_ROW, b""), said, "sha256").hex()

    def _derive(self, label: bytes, salt: bytes) -> bytes:
        return HKDF(SHA256(), KEY_BYTES, salt, label).derive(self.secret)


def sealed(key: RegistryKey, digest: bytes, source: Reader, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """A plaintext as the pieces of a blob.

    Args:
        key: of the registry.
        digest: SHA-256 of the plaintext.
        source: the plaintext.
        chunk_bytes: of the plaintext in each piece.
    """
    header = _HEADER.pack(_MAGIC, _VERSION, chunk_bytes, salt := os.urandom(_SALT_BYTES))
    cipher = key.cipher(salt)
    yield header
    for number, (chunk, is_last) in enumerate(_chunks(source, chunk_bytes)):
        yield cipher.encrypt(_nonce(number, is_last), chunk, header + digest)


def opened(key: RegistryKey, digest: bytes, blob: Reader) -> Iterator[bytes]:
    """The plaintext of a blob, in chunks that are each authentic; the last one only of a whole blob.

    Args:
        key: of the registry.
        digest: SHA-256 of the plaintext, as `sealed` got it.
        blob: what `sealed` gave.

    Raises:
        UsageError: it is damaged, cut, another blob, or was made under another key.
    """
    header = blob.read(_HEADER.size)
    if len(header) != _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
        raise UsageError("it is no blob of a registry")
    _, version, chunk_bytes, salt = _HEADER.unpack(header)
    if version != _VERSION:
        raise UsageError(f"it has format {version}, this version reads {_VERSION}")
    if not 0 < chunk_bytes <= _LARGEST_CHUNK:  # it decides how much memory is taken
        raise UsageError(f"it says that its chunks have {chunk_bytes} bytes")
    cipher = key.cipher(salt)
    for number, (chunk, is_last) in enumerate(_chunks(blob, chunk_bytes + _TAG_BYTES)):
        try:
            yield cipher.decrypt(_nonce(number, is_last), chunk, header + digest)
        except InvalidTag:
            raise UsageError(f"chunk {number} is damaged, missing, or another model's") from None


def _chunks(source: Reader, size: int) -> Iterable[tuple[bytes, bool]]:
    """Pieces of `size` bytes and whether each is the last, which alone may be shorter, and is there even if empty."""
    chunk = source.read(size)
    while following := source.read(size):
        yield chunk, False
        chunk = following
    yield chunk, True


def _nonce(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([is_last])

"""What a key holder keeps of a key, to seal it for devices that come later: encrypted under the holder's own key.

magic, salt (32 bytes), then `HeldKey` of protos/he_key.proto in chunks, as `propolis.secure.envelope` seals a content.
So it opens with the holder's key, and with its passphrase where that has one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from propolis.protos import he_key_pb2 as pb
from propolis.records import open_file, read_bytes
from propolis.secure.envelope import CHUNK_BYTES, SEALED_CHUNK_BYTES, chunk_count, open_content, seal_content
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.he.keys import LARGEST_SEALED, Secret
from propolis.secure.he.published import Published
from propolis.secure.he.tag import MAC_KEY_BYTES
from propolis.secure.identity import DIGEST_BYTES, LARGEST_INDEX, SigningKey
from propolis.secure.labels import HE_HELD
from propolis.secure.release import LARGEST_NUMBER
from propolis.secure.wire import LARGEST_MESSAGE, between, decode, encode, many, sized, version_field
from propolis.storage import remove_stale, write_atomically

_MAGIC = b"propolis he held\x01"
_SALT_BYTES = 32
_BEGIN = len(_MAGIC) + _SALT_BYTES


@dataclass(frozen=True, slots=True)
class Member:
    """A device that a key was sealed for: its place in the roster, and the digest of its descriptor."""

    index: int = between(0, LARGEST_INDEX)
    descriptor: bytes = sized(DIGEST_BYTES)


@dataclass(frozen=True, slots=True, repr=False)
class HeldKey:
    """A key in its holder's hands.

    Attributes:
        published: what the server has of it.
        number: that it was stated with.
        mac_key, secret_key: its secret part.
        roster: number of the newest roster that it was sealed under.
        members: whom it was sealed for, or may have been when the holder was killed; by rising index.
    """

    published: Published
    number: int = between(1, LARGEST_NUMBER)
    mac_key: bytes = sized(MAC_KEY_BYTES)
    secret_key: bytes = sized(1, LARGEST_SEALED)
    roster: int = between(1, LARGEST_NUMBER)
    members: tuple[Member, ...] = many(LARGEST_INDEX + 1)
    version: int = version_field()

    @property
    def secret(self) -> Secret:
        """Its secret part."""
        return Secret(self.mac_key, self.secret_key)


def save_held(path: Path, holder_key: SigningKey, held: HeldKey) -> None:
    """Write what a holder keeps, for its owner alone; raises StorageError."""
    content = encode(held, pb.HeldKey)
    salt, count = os.urandom(_SALT_BYTES), chunk_count(len(content))
    chunks = (content[begin : begin + CHUNK_BYTES] for begin in range(0, len(content), CHUNK_BYTES))
    sealed = b"".join(seal_content(_key(holder_key, salt), _MAGIC, chunks, count))
    remove_stale(path)
    write_atomically(path, _MAGIC + salt + sealed, mode=0o600)


def load_held(path: Path, holder_key: SigningKey) -> HeldKey | None:
    """What a holder keeps; None where it has made no key yet.

    Raises:
        UsageError: the file cannot be read, is damaged, or another holder's.
    """
    if not path.exists():
        return None
    with open_file(path) as file:
        data = read_bytes(file, LARGEST_MESSAGE)
    sealed = data[_BEGIN:]
    chunks = [sealed[begin : begin + SEALED_CHUNK_BYTES] for begin in range(0, len(sealed), SEALED_CHUNK_BYTES)]
    try:
        if not data.startswith(_MAGIC) or not chunks:
            raise UsageError("it is no such file")
        opened = b"".join(open_content(_key(holder_key, data[len(_MAGIC) : _BEGIN]), _MAGIC, chunks, len(chunks)))
        return decode(HeldKey, opened, pb.HeldKey)
    except PropolisError:
        raise UsageError(
            f"{path} does not open with this holder's key: it is another holder's, or damaged; move it away, and "
            "a new key is made for all devices"
        ) from None


def _key(holder_key: SigningKey, salt: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, HE_HELD).derive(holder_key.private)

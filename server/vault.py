"""Files by their digest, encrypted: what a registry keeps of its models."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open

from propolis.secure.errors import UsageError
from propolis.secure.he.messages import is_encrypted_model
from propolis.server.at_rest import CHUNK_BYTES, RegistryKey, opened, sealed
from propolis.server.blobs import Blobs
from propolis.server.registry_records import Format


class Vault:
    """The files of one registry.

    Args:
        key: that they are encrypted under.
        url: folder or URL of the blobs.

    Raises:
        UsageError: the URL is not usable.
    """

    def __init__(self, key: RegistryKey, url: str) -> None:
        self._key = key
        self.blobs = Blobs(url)

    def name_of(self, digest: bytes) -> str:
        """The name of the blob that holds the file with this SHA-256."""
        return self._key.name_of(digest)

    def holds(self, digest: bytes) -> bool:
        """Whether there is such a file; raises StorageError."""
        return self.blobs.has(self.name_of(digest))

    def store(self, file: Path | bytes, digest: bytes) -> None:
        """Keep a file, or what would be in one, also where its blob is there: it may be damaged, or about to be swept.

        Raises:
            UsageError: the file has not, or no longer, this digest; nothing has been stored.
            StorageError: it could not be written.
        """
        with _opened(file) as source:
            hashing = _Hashing(source)
            self.blobs.write(self.name_of(digest), self._checked(hashing, digest, file))

    def read(self, digest: bytes) -> Iterator[bytes]:
        """The file with this SHA-256, in chunks; each is authentic, and the last comes only of a whole file.

        Raises:
            UsageError: the blob is missing, damaged or another file's.
            StorageError: it cannot be read.
        """
        hashed = hashlib.sha256()
        with self.blobs.open(self.name_of(digest)) as blob:
            for chunk in opened(self._key, digest, blob):
                hashed.update(chunk)
                yield chunk
        if hashed.digest() != digest:  # only who has the key can have made this
            raise UsageError(f"its SHA-256 is {hashed.hexdigest()}")

    def _checked(self, source: _Hashing, digest: bytes, file: Path | bytes) -> Iterator[bytes]:
        """The pieces of the blob, which is not finished when the file has changed since its digest was taken."""
        yield from sealed(self._key, digest, source)
        if source.hashed.digest() != digest:
            name = file if isinstance(file, Path) else "the content"
            raise UsageError(f"{name} changed while it was registered: try again when it is complete")


class _Hashing:
    """A reader that knows the digest of what it has read."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self.hashed = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self.hashed.update(data)
        return data


def digest_of(file: Path | bytes) -> tuple[bytes, int]:
    """SHA-256 and size in bytes of a file, or of what would be in one; raises UsageError when it cannot be read."""
    hashed, size = hashlib.sha256(), 0
    with _opened(file) as source:
        while chunk := source.read(CHUNK_BYTES):
            hashed.update(chunk)
            size += len(chunk)
    return hashed.digest(), size


def format_of(file: Path) -> Format:
    """What a model's file is: a whole one of safetensors, as other formats run code when they are loaded, or encrypted.

    Raises:
        UsageError: it is neither, or cannot be read.
    """
    _opened(file).close()
    try:
        with safe_open(file, framework="numpy"):
            return Format.SAFETENSORS
    except (SafetensorError, OSError) as error:
        if is_encrypted_model(file.read_bytes()):
            return Format.ENCRYPTED
        raise UsageError(f"{file} is no file of safetensors, and no encrypted model: {error}") from None


def _opened(file: Path | bytes) -> IO[bytes]:
    if isinstance(file, bytes):
        return io.BytesIO(file)
    try:
        return file.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None

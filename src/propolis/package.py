"""Packages in files: what the server writes and a device reads, a chunk at a time.

package     magic, length of the header (4 bytes), header (`Header` of protos/model.proto), ciphertext
keys        magic, kem (1 byte, as in the manifest), digest of the manifest, then for each device, by rising index:
            index (4 bytes), sealed key (80 bytes, or 1,168 by the kem)
one key     `WrappedKey` of protos/model.proto, which is also what travels to a device
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from struct import Struct
from typing import BinaryIO, Self

from propolis.protos import model_pb2 as pb
from propolis.records import find_record, open_file, read_bytes, record_of
from propolis.secure.content import WRAPPED_BYTES, WrappedKey, checked_chunks, require_chunk_digests
from propolis.secure.envelope import SEALED_CHUNK_BYTES, chunk_count
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.identity import DIGEST_BYTES, Signed
from propolis.secure.kem import Kem
from propolis.secure.manifest import LARGEST_PLAINTEXT, Accepted, Expected, Manifest, Release, Trust, accept
from propolis.secure.wire import decode, encode, sized, version_field
from propolis.storage import write_atomically

_MAGIC, _KEYS_MAGIC = b"propolis package\x01", b"propolis keys"
_LENGTH = Struct(">I")
_RECORDS = {kem: record_of(size) for kem, size in WRAPPED_BYTES.items()}
_KEYS_HEAD = len(_KEYS_MAGIC) + 1 + DIGEST_BYTES
# The digests of the chunks of the largest content, and room for the two signed statements.
_LARGEST_HEADER = DIGEST_BYTES * chunk_count(LARGEST_PLAINTEXT) + 2**18
_LARGEST_KEY = 2048


@dataclass(frozen=True, slots=True)
class Header:
    """What a package begins with."""

    delegation: Signed
    manifest: Signed
    chunk_digests: bytes = sized(DIGEST_BYTES, DIGEST_BYTES * chunk_count(LARGEST_PLAINTEXT))
    version: int = version_field()

    @property
    def release(self) -> Release:
        """What is signed."""
        return Release(self.delegation, self.manifest)

    @property
    def framed(self) -> bytes:
        """The header as a package begins with it."""
        encoded = encode(self, pb.Header)
        return _MAGIC + _LENGTH.pack(len(encoded)) + encoded


class Package:
    """An open package file; nothing in it is believed.

    Args:
        file: of the package, which is read from here on.
        name: for messages.

    Raises:
        PeerError: it is no package.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        if read_bytes(file, len(_MAGIC)) != _MAGIC:
            raise PeerError(Refusal.MALFORMED, f"{name} is no package of this version of Propolis")
        length = int.from_bytes(read_bytes(file, _LENGTH.size), "big")
        if length > _LARGEST_HEADER:
            raise PeerError(Refusal.MALFORMED, f"the header of {name} has {length} bytes, {_LARGEST_HEADER} at most")
        self.header = decode(Header, read_bytes(file, length), pb.Header, _LARGEST_HEADER)
        self._begin = file.tell()

    @property
    def release(self) -> Release:
        """The signed statements that the package comes with."""
        return self.header.release

    def require_whole(self, manifest: Manifest) -> None:
        """Refuse a file that is longer or shorter than its manifest says, before it is read.

        Raises:
            TrustError: it is, or the digests of its chunks are not the manifest's.
        """
        require_chunk_digests(manifest, self.header.chunk_digests)
        size = os.fstat(self._file.fileno()).st_size - self._begin
        if size != manifest.ciphertext_size:
            raise TrustError(
                Refusal.PACKAGE, f"the package has {size} bytes of content, expected {manifest.ciphertext_size}"
            )

    def chunks(self) -> Iterator[bytes]:
        """The ciphertext, chunk by chunk, each checked against its digest; raises TrustError."""
        self._file.seek(self._begin)
        return checked_chunks(iter(lambda: read_bytes(self._file, SEALED_CHUNK_BYTES), b""), self.header.chunk_digests)

    def parts(self) -> Iterator[bytes]:
        """The whole file in parts, to copy it: what is not what it was when it was checked raises TrustError."""
        yield self.header.framed
        yield from self.chunks()

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, follow: bool = True) -> Iterator[Self]:
        """Open a package; raises UsageError when it cannot be read, and as the constructor does."""
        with open_file(path, follow=follow) as file:
            yield cls(file, path.name)


def verify_package(path: Path, trust: Trust, expected: Expected) -> Accepted:
    """What a package says, all of it checked as devices do, as far as that goes without a key.

    Raises:
        UsageError: it cannot be read.
        PeerError, TrustError: devices would refuse it.
    """
    with Package.open(path) as package:
        accepted = accept(package.release, trust, expected)
        package.require_whole(accepted.manifest)
        for _ in package.chunks():
            pass
    return accepted


def write_keys(path: Path, manifest: bytes, keys: Iterable[WrappedKey], kem: Kem = Kem.X25519) -> None:
    """Write the keys of all devices, which come by rising index and are sealed with `kem`; raises StorageError."""
    records = (_RECORDS[kem].pack(key.index, key.sealed) for key in keys)
    write_atomically(path, chain((_KEYS_MAGIC + bytes([kem]) + manifest,), records))


def write_key(path: Path, key: WrappedKey) -> None:
    """Write one device's key; raises StorageError."""
    write_atomically(path, encode(key, pb.WrappedKey), mode=0o600)


def read_key(path: Path, index: int, *, follow: bool = True) -> WrappedKey:
    """A device's key, from a file with its own or with those of all devices.

    Args:
        path: the file.
        index: the device's.
        follow: whether the file may be a symbolic link.

    Raises:
        UsageError: it cannot be read.
        PeerError: it is no such file, or has no key for this device.
    """
    with open_file(path, follow=follow) as file:
        begin = read_bytes(file, _KEYS_HEAD)
        if begin.startswith(_KEYS_MAGIC) and len(begin) == _KEYS_HEAD:
            sealed = find_record(file, _KEYS_HEAD, _record_in(begin, path.name), index)
            key = None if sealed is None else WrappedKey(begin[-DIGEST_BYTES:], index, sealed)
        else:
            key = decode(WrappedKey, begin + read_bytes(file, _LARGEST_KEY), pb.WrappedKey, _LARGEST_KEY)
    if key is None or key.index != index:
        raise PeerError(Refusal.PACKAGE, f"{path.name} has no key for device {index}: the package is not for it")
    return key


def manifest_of_keys(path: Path) -> bytes:
    """Digest of the manifest that the keys in a file are for; raises UsageError, or PeerError where it is none."""
    with open_file(path) as file:
        begin = read_bytes(file, _KEYS_HEAD)
    if not begin.startswith(_KEYS_MAGIC) or len(begin) != _KEYS_HEAD:
        raise PeerError(Refusal.MALFORMED, f"{path.name} has no keys of a package")
    return begin[-DIGEST_BYTES:]


def _record_in(begin: bytes, name: str) -> Struct:
    """The form of the records in a file of keys that begins so."""
    kem = begin[len(_KEYS_MAGIC)]
    if kem not in set(Kem):
        raise PeerError(Refusal.MALFORMED, f"{name} has keys of a kind ({kem}) that this version does not know")
    return _RECORDS[Kem(kem)]

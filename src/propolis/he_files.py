"""The sealed parts of a key of homomorphic encryption in a file: what its holder writes and devices read.

keys        magic, bytes of a sealed part (4 bytes), key id (32 bytes), then for each device, by rising index: index
            (4 bytes), sealed part
one key     `SealedKey` of protos/he.proto, which is also what `propolis.secure.he.keys.open_key` takes
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from struct import Struct

from propolis.protos import he_pb2 as pb
from propolis.records import INDEX_BYTES, find_record, open_file, read_bytes, record_of
from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.he.keys import LARGEST_SEALED, SealedKey
from propolis.secure.he.published import LARGEST_PUBLISHED, Published
from propolis.secure.identity import DIGEST_BYTES
from propolis.secure.wire import decode, encode
from propolis.storage import write_atomically

_MAGIC = b"propolis he keys\x01"
_HEAD = Struct(f">{len(_MAGIC)}sI{DIGEST_BYTES}s")
_LARGEST_FILE = LARGEST_SEALED + 2**10


def read_published(path: Path) -> Published:
    """The public part of a key from a file, which proves nothing yet; raises UsageError, or PeerError if it is none."""
    with open_file(path) as file:
        return Published.from_bytes(read_bytes(file, LARGEST_PUBLISHED + 1))


def write_sealed_keys(path: Path, key_id: bytes, size: int, keys: Iterable[SealedKey]) -> None:
    """Write the sealed parts of a key for all devices, a device at a time.

    Args:
        path: the file.
        key_id: of the key, 32 bytes.
        size: bytes of each sealed part.
        keys: by rising index.

    Raises:
        StorageError: the file could not be written.
    """
    record = record_of(size)
    records = (record.pack(key.index, key.sealed) for key in keys)
    write_atomically(path, chain((_HEAD.pack(_MAGIC, size, key_id),), records))


def sealed_keys(path: Path, key_id: bytes) -> Iterator[SealedKey]:
    """The sealed parts in a file, by rising index; none where there is no such file, or it is of another key.

    Raises:
        UsageError: the file cannot be read, or is no such file, or is cut.
    """
    if not path.exists():
        return
    with open_file(path) as file:
        head = _head(read_bytes(file, _HEAD.size))
        if head is None:
            raise UsageError(f"{path} holds no sealed keys: give another folder")
        size, found = head
        if found != key_id:
            return
        record, last = record_of(size), -1
        while data := read_bytes(file, record.size):
            if len(data) != record.size:
                raise UsageError(f"{path} is damaged: remove it, and all devices get theirs anew")
            index, sealed = record.unpack(data)
            if index <= last:
                raise UsageError(f"{path} is damaged: remove it, and all devices get theirs anew")
            last = index
            yield SealedKey(key_id, index, sealed)


def sealed_indices(path: Path, key_id: bytes) -> frozenset[int] | None:
    """Whom a key is sealed for in a file; None where there is none, or it is of another key.

    Raises:
        UsageError: the file cannot be read, or is no such file, or is cut.
    """
    if not path.exists():
        return None
    with open_file(path, follow=False) as file:
        head = _head(read_bytes(file, _HEAD.size))
        if head is None:
            raise UsageError(f"{path} holds no sealed keys: copy it again from the key's holder")
        size, found = head
        if found != key_id:
            return None
        record = record_of(size)
        count, cut = divmod(os.fstat(file.fileno()).st_size - _HEAD.size, record.size)
        if cut:
            raise UsageError(f"{path} is cut: copy it again from the key's holder")
        indices = []
        for number in range(count):
            file.seek(_HEAD.size + number * record.size)
            indices.append(int.from_bytes(read_bytes(file, INDEX_BYTES), "big"))
        if sorted(set(indices)) != indices:
            raise UsageError(f"{path} is damaged: copy it again from the key's holder")
        return frozenset(indices)


def read_sealed_key(path: Path, index: int, *, follow: bool = True) -> bytes:
    """A device's sealed part of a key, from a file with its own or with those of all devices.

    Args:
        path: the file.
        index: the device's.
        follow: whether the file may be a symbolic link.

    Raises:
        UsageError: it cannot be read.
        PeerError: it is no such file, or has nothing for this device.
    """
    with open_file(path, follow=follow) as file:
        begin = read_bytes(file, _HEAD.size)
        head = _head(begin)
        if head is None:
            data = begin + read_bytes(file, _LARGEST_FILE)
            found = decode(SealedKey, data, pb.SealedKey, _LARGEST_FILE).index
            if found != index:
                raise _nothing_for(path, index)
            return data
        size, key_id = head
        sealed = find_record(file, _HEAD.size, record_of(size), index)
        if sealed is None:
            raise _nothing_for(path, index)
        return encode(SealedKey(key_id, index, sealed), pb.SealedKey)


def _head(data: bytes) -> tuple[int, bytes] | None:
    """Size of a sealed part and key id; None where the file is another one."""
    if len(data) != _HEAD.size:
        return None
    magic, size, key_id = _HEAD.unpack(data)
    if magic != _MAGIC or not 0 < size <= LARGEST_SEALED:
        return None
    return size, key_id


def _nothing_for(path: Path, index: int) -> PeerError:
    return PeerError(Refusal.HE_KEY, f"{path.name} has no key for device {index}: it was not sealed for it")

"""Files of records of one size, by rising index: a device's is found with a few reads, however many there are."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import BinaryIO

from propolis.secure.errors import UsageError

INDEX_BYTES = 4


def record_of(size: int) -> Struct:
    """The form of a record: an index of 4 bytes, and `size` bytes."""
    return Struct(f">I{size}s")


def find_record(file: BinaryIO, begin: int, record: Struct, index: int) -> bytes | None:
    """What a record holds, by binary search; None where there is none with this index.

    Args:
        file: to search in.
        begin: where the first record is.
        record: the form of all.
        index: that is wanted.

    Raises:
        UsageError: the disk does not give the bytes.
    """
    low, high = 0, (os.fstat(file.fileno()).st_size - begin) // record.size
    while low < high:
        middle = (low + high) // 2
        file.seek(begin + middle * record.size)
        found, content = record.unpack(read_bytes(file, record.size))
        if found == index:
            return bytes(content)
        low, high = (middle + 1, high) if found < index else (low, middle)
    return None


@contextmanager
def open_file(path: Path, *, follow: bool = True) -> Iterator[BinaryIO]:
    """Open a file that is one; raises UsageError.

    Args:
        path: the file.
        follow: whether it may be a symbolic link.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)  # a pipe does not block
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(f"cannot read {path}: it is no file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bytes(file: BinaryIO, size: int) -> bytes:
    """Bytes of a file, fewer at its end; raises UsageError where the disk does not give them."""
    try:
        return file.read(size)
    except OSError as error:
        raise UsageError(f"cannot read a package or a key: {error.strerror}") from None

"""Bytes that arrive piece by piece: small ones in memory, large ones and what exceeds a budget in nameless files."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO

from propolis.secure.errors import StorageError

LARGEST_IN_MEMORY = 8 * 2**20
MEMORY = 64 * 2**20


class Spools:
    """Makes spools, and keeps what all of them hold in memory within a budget.

    Args:
        folder: for the files; the system's temporary folder by default.
        memory: bytes of all spools in memory together.
        largest: bytes of the largest one in memory.
    """

    def __init__(self, folder: Path | None = None, memory: int = MEMORY, largest: int = LARGEST_IN_MEMORY) -> None:
        self._folder, self._left, self._largest = folder, memory, largest
        self._lock = threading.Lock()

    def open(self, size: int) -> Spool:
        """A spool for `size` bytes; raises StorageError when there is no room for its file."""
        with self._lock:
            in_memory = size <= min(self._largest, self._left)
            self._left -= size if in_memory else 0
        if in_memory:
            return Spool(BytesIO(), size, self)
        try:
            return Spool(tempfile.TemporaryFile(dir=self._folder), 0, self)
        except OSError as error:
            raise StorageError(f"cannot spool a message of {size} bytes: {error.strerror}") from None

    def give_back(self, size: int) -> None:
        """Memory that a closed spool no longer holds."""
        with self._lock:
            self._left += size


class Spool:
    """Some bytes, appended and then read from the start; made by `Spools.open`."""

    def __init__(self, file: IO[bytes], reserved: int, owner: Spools) -> None:
        self._file, self._reserved, self._owner = file, reserved, owner
        self._closed = False

    @property
    def in_memory(self) -> bool:
        """Whether it takes memory and no file."""
        return isinstance(self._file, BytesIO)

    def append(self, data: bytes) -> None:
        """Add to the end; raises StorageError when the disk is full."""
        try:
            self._file.write(data)
        except OSError as error:
            raise StorageError(f"cannot spool a message: {error.strerror or os.strerror(error.errno or 0)}") from None

    def rewind(self) -> None:
        """Read from the start from now on."""
        try:
            self._file.seek(0)
        except OSError as error:  # what was buffered did not fit
            raise StorageError(f"cannot spool a message: {error.strerror}") from None

    def read(self, size: int) -> bytes:
        """The next bytes."""
        return self._file.read(size)

    def close(self) -> None:
        """Forget the bytes; a full disk is no obstacle to that."""
        if not self._closed:
            self._closed = True
            self._owner.give_back(self._reserved)
            with suppress(OSError):  # what was still buffered does not fit
                self._file.close()

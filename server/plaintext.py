"""The files of a package as one plaintext, read as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from propolis.secure.envelope import CHUNK_BYTES
from propolis.secure.errors import UsageError
from propolis.secure.manifest import LARGEST_PLAINTEXT, MOST_FILES, Kind, PackagedFile, is_file_name


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A file to seal, and what it is for."""

    path: Path
    kind: Kind

    @property
    def name(self) -> str:
        """What it is called in the package."""
        return self.path.name


@dataclass(frozen=True, slots=True, repr=False)
class PlainData:
    """What would be in a file to seal, and what it is for: nothing of it has to lie on a disk."""

    name: str
    kind: Kind
    data: bytes


class Plaintext:
    """Files, measured once and then read again.

    Args:
        files: in the order that they are sealed in.

    Attributes:
        files: as the manifest has them.
        size: bytes of all of them.
        digest: SHA-256 of all of them, one after another.

    Raises:
        UsageError: a file cannot be read or has a name that a package cannot carry, or they are too much or nothing.
    """

    def __init__(self, files: Sequence[PlainFile | PlainData]) -> None:
        self._files = files
        whole = hashlib.sha256()
        self.files = tuple(_measure(file, whole) for file in files)
        self.size = sum(file.size for file in self.files)
        self.digest = whole.digest()
        if not 1 <= self.size <= LARGEST_PLAINTEXT:
            raise UsageError(f"a package has 1 to {LARGEST_PLAINTEXT} bytes, got {self.size}")
        if len(files) > MOST_FILES:
            raise UsageError(f"a package has {MOST_FILES} files at most, got {len(files)}")

    def chunks(self) -> Iterator[bytes]:
        """The plaintext in chunks; raises UsageError when a file is not what it was."""
        whole, waiting = hashlib.sha256(), bytearray()
        for part in chain.from_iterable(map(_read, self._files)):
            whole.update(part)
            waiting += part
            if len(waiting) > CHUNK_BYTES:  # what is left may be all of the last chunk
                yield bytes(waiting[:CHUNK_BYTES])
                del waiting[:CHUNK_BYTES]
        if whole.digest() != self.digest:
            raise UsageError("a file changed while it was sealed: seal it again")
        yield bytes(waiting)


def _measure(file: PlainFile | PlainData, whole: hashlib._Hash) -> PackagedFile:
    if not is_file_name(file.name):
        raise UsageError(f"{file.name!r} is no name for a file of a package: letters, digits, dot, - and _")
    own, size = hashlib.sha256(), 0
    for part in _read(file):
        own.update(part)
        whole.update(part)
        size += len(part)
    return PackagedFile(file.name, size, own.digest(), file.kind)


def _read(file: PlainFile | PlainData) -> Iterator[bytes]:
    """A file in parts, none longer than a chunk."""
    if isinstance(file, PlainData):
        yield from (file.data[at : at + CHUNK_BYTES] for at in range(0, len(file.data), CHUNK_BYTES))
        return
    try:
        with file.path.open("rb") as source:
            while part := source.read(CHUNK_BYTES):
                yield part
    except OSError as error:
        raise UsageError(f"cannot read {file.path}: {error.strerror}") from None

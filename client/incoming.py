"""A package on its way: the file that it becomes, chunk by chunk, and where it goes on after a cut or a crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from propolis.package import Header, Package
from propolis.secure.content import require_chunk
from propolis.secure.errors import PropolisError, StorageError, TrustError, UsageError
from propolis.secure.identity import DIGEST_BYTES

INCOMING_FOLDER = "incoming"


class Incoming:
    """A package that arrives; use it as a context manager.

    What an earlier one of the same header left is looked at again, and kept as far as its chunks are right.

    Args:
        device: the device's folder.
        header: of the package, which says what its chunks are.

    Attributes:
        path: of the file.
        next: number of the first chunk that is missing.

    Raises:
        StorageError: it cannot be written.
    """

    def __init__(self, device: Path, header: Header) -> None:
        self._header = header
        self.path = device / INCOMING_FOLDER / header.release.digest.hex()
        self.next = 0
        with _reporting(self.path):
            _make_folder(self.path.parent)
            self.next, size = self._left()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._file = os.fdopen(descriptor, "r+b")
            self._file.truncate(size)
            self._file.seek(size)
            if not size:
                self._file.write(header.framed)

    def __enter__(self) -> Self:
        """The package, as far as it has come."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; what is in it stays."""
        with _reporting(self.path):
            self._file.close()

    @property
    def is_whole(self) -> bool:
        """Whether all chunks are there."""
        return self.next * DIGEST_BYTES == len(self._header.chunk_digests)

    def add(self, chunk: bytes) -> None:
        """Write the next chunk.

        Raises:
            TrustError: it is not the one that was released.
            StorageError: it could not be written.
        """
        require_chunk(self.next, chunk, self._header.chunk_digests)
        with _reporting(self.path):
            self._file.write(chunk)
        self.next += 1

    def _left(self) -> tuple[int, int]:
        """How many chunks an earlier attempt left, and the size of the file up to them."""
        number, size = 0, len(self._header.framed)
        try:
            with Package.open(self.path, follow=False) as package:
                if package.header != self._header:
                    return 0, 0
                for chunk in package.chunks():
                    number, size = number + 1, size + len(chunk)
        except TrustError:  # it was cut there
            return number, size
        except PropolisError:  # there is none, or not even a header
            return 0, 0
        return number, size


def remove_others(device: Path, wanted: Collection[bytes]) -> None:
    """Remove what is left of packages but for those whose manifests have these digests; raises StorageError."""
    folder, kept = device / INCOMING_FOLDER, {digest.hex() for digest in wanted}
    with _reporting(folder):
        if folder.is_symlink():
            raise UsageError(f"{folder} is a symbolic link, which could lead anywhere: remove it")
        for left in folder.glob("*"):
            if left.name not in kept:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink():
        raise UsageError(f"{folder} is a symbolic link, which could lead anywhere: remove it")


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None

"""A package on its way: the file that it becomes, chunk by chunk, and where it goes on after a cut or a crash."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from propolis.link.delivery import MOST_OFFERS, Release
from propolis.package import Header, Package
from propolis.protos import model_pb2
from propolis.secure.content import require_chunk
from propolis.secure.errors import PropolisError, StorageError, TrustError, UsageError
from propolis.secure.identity import DIGEST_BYTES
from propolis.secure.manifest import Manifest
from propolis.secure.wire import decode

INCOMING_FOLDER = "incoming"
# Room that a download leaves: training keeps its state on the same disk.
_MARGIN_BYTES = 16 * 2**20
_KEPT_S = 14 * 24 * 3600


class Incoming:
    """A package that arrives; use it as a context manager.

    What an earlier one of the same header left is looked at again, and kept as far as its chunks are right.

    Args:
        device: the device's folder.
        header: of the package, which says what its chunks are; it has been found acceptable.

    Attributes:
        path: of the file.
        next: number of the first chunk that is missing.

    Raises:
        StorageError: it cannot be written, or there is no room for it and for the copy that is installed.
    """

    def __init__(self, device: Path, header: Header) -> None:
        self._header = header
        self.path = device / INCOMING_FOLDER / header.release.digest.hex()
        self.next = 0
        with _reporting(self.path):
            _make_folder(self.path.parent)
            self.next, size = self._left()
            _require_room(self.path.parent, header, size)
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
            StorageError: it could not be written; where the disk is full, what is there of the package is removed.
        """
        require_chunk(self.next, chunk, self._header.chunk_digests)
        with _reporting(self.path):
            try:
                self._file.write(chunk)
                self._file.flush()
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    os.truncate(self.path, 0)
                raise
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


def begun(device: Path) -> list[Release]:
    """The releases that a device has parts of, as these say; nobody has checked it. Raises StorageError."""
    found = []
    with _reporting(device / INCOMING_FOLDER):
        for path in sorted((device / INCOMING_FOLDER).glob("*"))[:MOST_OFFERS]:
            try:
                with Package.open(path, follow=False) as package:
                    manifest = decode(Manifest, package.release.manifest.payload, model_pb2.Manifest)
                    found.append(Release(manifest.name, manifest.sequence, package.release.digest))
            except PropolisError:  # cut within its header: it begins anew
                continue
    return found


def remove_others(device: Path, wanted: Collection[bytes], unwanted: Collection[bytes]) -> None:
    """Remove what is left of packages: of these at once, of others that are not wanted after two weeks.

    A server that offers nothing for a while, or pauses, may go on.

    Args:
        device: the device's folder.
        wanted: digests of the manifests that are on offer.
        unwanted: of those that are installed, or were refused.

    Raises:
        StorageError: something cannot be removed.
    """
    folder = device / INCOMING_FOLDER
    kept, gone = ({digest.hex() for digest in digests} for digests in (wanted, unwanted))
    with _reporting(folder):
        if folder.is_symlink():
            raise UsageError(f"{folder} is a symbolic link, which could lead anywhere: remove it")
        for left in folder.glob("*"):
            is_old = time.time() - left.lstat().st_mtime > _KEPT_S
            if left.name in gone or (left.name not in kept and is_old):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _require_room(folder: Path, header: Header, there: int) -> None:
    manifest = decode(Manifest, header.manifest.payload, model_pb2.Manifest)
    whole = len(header.framed) + manifest.ciphertext_size
    needed, free = 2 * whole - there + _MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"no room for {manifest.name}: it takes {needed:,} bytes while it is installed, {free:,} are free"
        )


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

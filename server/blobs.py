"""Files of a registry by name, through fsspec: in a local folder, or in any store that fsspec has a driver for.

A blob is written under a temporary name and renamed when it is whole, so under its own name it is whole or absent.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from propolis.secure.errors import StorageError, UsageError
from propolis.server.urls import without_secrets
from propolis.storage import sync_folder

_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = "tmp-"


class Blobs:
    """The blobs of one registry.

    Args:
        url: a folder, or a URL that fsspec knows.

    Raises:
        UsageError: fsspec knows no such store, or its driver is not installed.
        StorageError: the store cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = without_secrets(url)
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"blobs cannot be kept at {self.url}: {without_secrets(str(error))}") from None
        except Exception as error:  # of a driver that connects at once; they have no base class in common
            said = without_secrets(str(error) or type(error).__name__)
            raise StorageError(f"blobs cannot be kept at {self.url}: {said[:300]}") from None
        self._is_local = isinstance(self._files, LocalFileSystem)

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        """Store a blob; when this returns, it is on the disk, or with the store.

        Raises:
            StorageError: it could not be written; nothing is there that was not before.
        """
        temporary = self._path(f"{_TEMPORARY}{uuid4().hex}")
        with self._reporting(f"cannot write a blob to {self.url}"):
            self._files.makedirs(self._root, exist_ok=True)
            try:
                self._write(temporary, pieces)
                self._rename(temporary, self._path(name))
            except BaseException:
                self._discard(temporary)
                raise

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A blob to read; raises UsageError where it is missing, StorageError where it cannot be read."""
        with self._reporting(f"cannot read blob {name} in {self.url}"):
            try:
                file = self._files.open(self._path(name), "rb")
            except FileNotFoundError:
                raise UsageError(f"blob {name} is missing in {self.url}") from None
            with file:
                yield file

    def has(self, name: str) -> bool:
        """Whether it is there; raises StorageError."""
        with self._reporting(f"cannot read {self.url}"):
            self._files.invalidate_cache()
            return bool(self._files.exists(self._path(name)))

    def delete(self, name: str) -> None:
        """Remove a blob, or what an interrupted write left, if it is still there; raises StorageError."""
        with self._reporting(f"cannot remove {name} in {self.url}"), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def older_than(self, seconds: float) -> list[str]:
        """Names of the blobs, and of what interrupted writes left, that were written so long ago or earlier.

        Raises:
            StorageError: the store cannot be listed, or does not tell how old its files are.
        """
        with self._reporting(f"cannot list {self.url}"):
            if not self._files.exists(self._root):
                return []
            self._files.invalidate_cache()
            names = [str(path).rpartition("/")[2] for path in self._files.ls(self._root, detail=False)]
            return sorted(name for name in names if _is_ours(name) and self._age(name) >= seconds)

    def _age(self, name: str) -> float:
        try:
            return time.time() - float(self._files.modified(self._path(name)).timestamp())
        except NotImplementedError:
            raise StorageError(f"{self.url} does not tell how old its files are") from None
        except FileNotFoundError:  # somebody else's rename or sweep
            return -1.0

    def _write(self, path: str, pieces: Iterable[bytes]) -> None:
        with self._files.open(path, "wb") as file:
            for piece in pieces:
                file.write(piece)
            if self._is_local:
                file.flush()
                os.fsync(file.fileno())

    def _rename(self, temporary: str, path: str) -> None:
        if not self._is_local:
            self._files.mv(temporary, path)
            return
        Path(temporary).replace(path)
        sync_folder(Path(self._root))

    def _discard(self, temporary: str) -> None:
        try:
            if self._files.exists(temporary):
                self._files.rm_file(temporary)
        except OSError:
            return  # the first error is the one to report, and sweeping finds it

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _reporting(self, what: str) -> Iterator[Any]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{what}: {without_secrets(str(error.strerror or error))}") from None


def place_of(url: str) -> str:
    """Where blobs go, for anybody who reads it in whatever folder.

    Raises:
        UsageError: it is not usable, or has credentials in it: it is kept in the database, in clear.
        StorageError: it cannot be reached.
    """
    if "://" in url and without_secrets(url) != url:
        raise UsageError(
            f"--blobs {without_secrets(url)}: leave out name, password and query, which the database would keep in "
            "clear; drivers take them from the environment or a file of their own"
        )
    Blobs(url)
    return url if "://" in url else str(Path(url).absolute())


def is_temporary(name: str) -> bool:
    """Whether it is what an interrupted write left."""
    return name.startswith(_TEMPORARY)


def _is_ours(name: str) -> bool:
    return is_temporary(name) or _NAME.fullmatch(name) is not None

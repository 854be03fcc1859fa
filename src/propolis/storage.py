"""Files that are whole or absent, whatever the instant of a crash."""

from __future__ import annotations

import fcntl
import glob
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from propolis.secure.errors import StorageError, UsageError

LOCK_DEADLINE_S, _LOCK_POLL_S = 30.0, 0.01
_RANDOM_LETTERS = 8  # that `tempfile` ends a name with


def write_atomically(path: Path, data: bytes | Iterator[bytes], mode: int = 0o644) -> None:
    """Replace `path` by `data`, or leave it as it is; when this returns, the data is on the disk.

    Args:
        path: the file, in a folder that exists.
        data: its new content, whole or in pieces.
        mode: its permissions; nobody has more at any time.

    Raises:
        StorageError: the data could not be written.
    """
    try:
        with _temporary(path, data, mode) as temporary:
            temporary.replace(path)
            sync_folder(path.parent)
    except OSError as error:
        previous = "; the previous one is whole" if path.exists() else ""
        raise StorageError(f"cannot write {path}: {error.strerror}{previous}") from None


def write_once(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Make `path` with this content unless it is there, whoever else does so at once; otherwise as `write_atomically`.

    Raises:
        StorageError: the data could not be written.
    """
    try:
        with _temporary(path, data, mode) as temporary, suppress(FileExistsError):
            os.link(temporary, path)
            sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def _temporary(path: Path, data: bytes | Iterator[bytes], mode: int) -> Iterator[Path]:
    """A file beside `path` with all of the data on the disk; locked, so that it is not taken for a left one."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            with suppress(OSError):  # a file system without locks
                _try_lock(file.fileno())
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(mode)
            yield temporary
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Remove what writes of `path` left when they were killed: it may be large, or secret.

    One that is written at this moment is locked, and stays.
    """
    with suppress(OSError):  # the write that follows says what is wrong
        for stale in path.parent.glob(f".{glob.escape(path.name)}.{'?' * _RANDOM_LETTERS}"):
            with suppress(OSError):
                _remove_unlocked(stale)


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _try_lock(descriptor):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a replacement last: the name is the folder's content, not the file's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced or written to; None where it cannot be looked at."""
    try:
        found = os.stat(path)  # noqa: PTH116, called often
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def locked(path: Path, wait_s: float | None = None) -> Iterator[int]:
    """Hold a lock among processes and threads, and have the file's descriptor.

    Raises:
        StorageError: another one holds it for longer, or it cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot lock {path}: {error.strerror}") from None
    wait_s = LOCK_DEADLINE_S if wait_s is None else wait_s
    try:
        deadline = time.monotonic() + wait_s
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise StorageError(f"another process has kept {path} locked for {wait_s:g} s")
            time.sleep(_LOCK_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)  # which also unlocks


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def alone(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock that one process may have; raises UsageError with `taken` where another one has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot lock {path}: {error.strerror}") from None
    try:
        if not _try_lock(descriptor):
            raise UsageError(taken)
        yield
    finally:
        os.close(descriptor)  # which also unlocks

"""Folders for a model that must lie in a file, in clear, for as long as a library reads it: in memory where that is.

All are in one folder of this user, for him alone. What a killed process left there is removed when the next one begins.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import RLock

from propolis.secure.errors import StorageError, UsageError
from propolis.storage import alone, locked

IN_MEMORY = Path("/dev/shm")  # noqa: S108, what is in it is checked
_LOCK = ".lock"
_SPARE_BYTES = 2**24
_diverting = RLock()


@contextmanager
def clear_folder(size: int) -> Iterator[Path]:
    """A new folder that is gone afterwards.

    Args:
        size: bytes that will lie in it: where memory has no room for them, it is on the disk that TMPDIR names.

    Raises:
        UsageError: the folder that all of these are in is somebody else's.
        StorageError: it cannot be made.
    """
    with ExitStack() as held:
        folder = _made(_home(size), held)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Have libraries make their temporary files here, as far as they ask Python where to; one thread at a time."""
    with _diverting:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def _home(size: int) -> Path:
    """Where these folders are: in memory, if there is room."""
    name = f"propolis-{os.getuid()}"
    with suppress(OSError):
        if shutil.disk_usage(IN_MEMORY).free >= size + _SPARE_BYTES and os.access(IN_MEMORY, os.W_OK | os.X_OK):
            return IN_MEMORY / name
    return Path(tempfile.gettempdir()) / name


def _made(home: Path, held: ExitStack) -> Path:
    """A new folder, whose lock is held as long as `held` is."""
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
        if home.is_symlink() or not home.is_dir() or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise UsageError(f"{home} must be a folder of your own that nobody else may enter: remove it")
        with locked(home / _LOCK):  # a folder that is not locked yet is not swept
            for stale in home.iterdir():
                if stale.is_dir():
                    _remove_unused(stale)
            folder = Path(tempfile.mkdtemp(dir=home))
            held.enter_context(alone(folder / _LOCK, f"{folder} is in use"))
            return folder
    except OSError as error:
        raise StorageError(f"cannot make a folder in {home}: {error.strerror}") from None


def _remove_unused(folder: Path) -> None:
    with suppress(UsageError, StorageError), alone(folder / _LOCK, f"{folder} is in use"):
        shutil.rmtree(folder, ignore_errors=True)

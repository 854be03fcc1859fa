"""A new registry: its key, its tables, and where its models go."""

from __future__ import annotations

from pathlib import Path

from propolis.secure.errors import StorageError, UsageError
from propolis.server.blobs import place_of
from propolis.server.registry_database import Database
from propolis.server.registry_key import load_or_make_key
from propolis.storage import locked

_LOCK = ".lock"


def make_registry(location: str, blobs: str | None) -> None:
    """Make the registry at `location`, unless there is one; see `Registry.make`."""
    database = Database(location)
    if database.folder is not None:
        _make_folder(database.folder)
    if database.exists:
        if blobs is not None:
            raise UsageError(f"the registry in {database.name} is there already, and its models: leave out --blobs")
    elif database.folder is not None:
        _make_in(database.folder, database, blobs)
    elif blobs is not None:
        database.create(place_of(blobs), load_or_make_key(None).check())
    else:
        raise UsageError(f"there is no registry in {database.name}: propolis models init --blobs makes one")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"cannot make a registry in {folder}: {error.strerror}") from None


def _make_in(folder: Path, database: Database, blobs: str | None) -> None:
    with locked(folder / _LOCK):
        if not database.exists:  # the key first: a crash leaves one that the next try takes
            database.create(place_of(blobs) if blobs else "", load_or_make_key(folder).check())

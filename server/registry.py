"""The registry: every model that was trained, in versions, encrypted, with where it comes from and what became of it.

A version is registered when its row is committed. Its blob is stored before, so a crash leaves at worst a blob that no
row names, which `sweep` removes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, select

from propolis.secure.errors import StorageError, UsageError
from propolis.server.blobs import place_of
from propolis.server.registry_database import Database
from propolis.server.registry_history import Aliases, records_of, row_of
from propolis.server.registry_key import load_key, load_or_make_key
from propolis.server.registry_records import (
    Lineage,
    Version,
    finite,
    require_data_name,
    require_name,
    require_tags,
)
from propolis.server.registry_tables import evaluations, tags, versions
from propolis.server.vault import Vault, digest_of, require_safetensors
from propolis.storage import locked, write_atomically

BLOBS_FOLDER, _LOCK = "blobs", ".lock"
GRACE_S = 3600.0  # that a blob without a row is left alone by `sweep`: a slow upload may be on its way
_TRIES = 3


class Registry:
    """An open registry; several processes and threads may use one at once.

    Args:
        location: a folder, or a URL of PostgreSQL.

    Raises:
        UsageError: there is no registry, it is of another version's, or its key is wrong or missing.
        StorageError: the database cannot be reached.
    """

    def __init__(self, location: str | Path) -> None:
        self._database = Database(str(location))
        blobs, key_check = self._database.described()
        key = load_key(self._database.folder)
        if key.check() != key_check:
            raise UsageError(f"the key is not that of the registry in {self.name}")
        self._vault = Vault(key, blobs or str((self._database.folder or Path()).absolute() / BLOBS_FOLDER))

    @classmethod
    def make(cls, location: str | Path, blobs: str | None = None) -> Registry:
        """The registry at `location`, made when there is none.

        Args:
            location: a folder, or a URL of PostgreSQL.
            blobs: folder or URL for the models of a new one; in the registry's folder by default.

        Raises:
            UsageError: a URL of PostgreSQL came without `blobs`, or as for an open one.
            StorageError: it cannot be written.
        """
        database = Database(str(location))
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
        return cls(location)

    @property
    def name(self) -> str:
        """Where it is, without a password."""
        return self._database.name

    def register(self, model: str, file: Path, lineage: Lineage | None = None) -> Version:
        """Make a file the next version of a model.

        The same file of the same run and round again is the version that it was: who was interrupted may ask again.

        Args:
            model: its name.
            file: of safetensors.
            lineage: where it comes from.

        Raises:
            UsageError: the name or the lineage's parent is wrong, or the file is not of safetensors.
            StorageError: it could not be stored; nothing has been registered.
        """
        require_name(model)
        lineage = lineage or Lineage()
        require_safetensors(file)
        digest, size = digest_of(file)
        for _ in range(_TRIES):
            self._vault.store(file, digest)
            with self._database.writing() as connection:
                if (known := _registered_before(connection, model, digest, lineage)) is not None:
                    return self._version(connection, model, known)
                if self._vault.holds(digest):  # a sweep may have come between, but none does now: it is a writer, too
                    number = self._add(connection, model, digest, size, lineage)
                    return self._version(connection, model, number)
        raise StorageError(f"{self.name}: the model was swept as soon as it was stored, {_TRIES} times")

    def models(self) -> list[str]:
        """Names of the models that have versions."""
        with self._database.reading() as connection:
            return list(connection.scalars(select(versions.c.model).distinct().order_by(versions.c.model)))

    def versions(self, model: str | None = None) -> list[Version]:
        """The versions of one model, or of all, the oldest first.

        Raises:
            UsageError: there is no such model.
        """
        wanted = [] if model is None else [versions.c.model == require_name(model)]
        with self._database.reading() as connection:
            found = records_of(connection, *wanted)
        if model is not None and not found:
            raise UsageError(f"there is no model '{model}' in {self.name}")
        return found

    def version(self, model: str, wanted: int | str) -> Version:
        """One version, by its number or an alias.

        Raises:
            UsageError: there is no such model, version or alias.
        """
        with self._database.reading() as connection:
            return self._version(connection, model, wanted)

    def read(self, version: Version) -> Iterator[bytes]:
        """The file of a version, in chunks; each is authentic, and the last comes only of a whole file.

        Raises:
            UsageError: the blob is missing, damaged or another one; before the first byte that is not the version's.
            StorageError: it cannot be read.
        """
        try:
            yield from self._vault.read(bytes.fromhex(version.digest))
        except UsageError as error:
            raise type(error)(f"{version} cannot be read: {error}") from None

    def export(self, version: Version, out: Path) -> None:
        """Write the file of a version, for its owner alone: it is in clear; raises as `read` does."""
        write_atomically(out, self.read(version), mode=0o600)

    def verify(self, version: Version) -> None:
        """Read all of a version; raises as `read` does."""
        for _ in self.read(version):
            pass

    def promote(self, model: str, wanted: int | str, alias: str = "champion") -> Version:
        """Set an alias to a version; raises UsageError when there is none such, or the alias is no word."""
        with self._database.writing() as connection:
            row = self._row(connection, model, wanted)
            Aliases(connection, model).set(alias, row.id)
            return self._version(connection, model, row.version)

    def rollback(self, model: str, alias: str = "champion") -> Version:
        """Set an alias to the version it was at before; again, to the one before that.

        Raises:
            UsageError: there is no such alias, or it was at no version before.
        """
        with self._database.writing() as connection:
            return self._version(connection, model, Aliases(connection, model).set_back(alias))

    def tag(self, model: str, wanted: int | str, given: Mapping[str, str], removed: Iterable[str] = ()) -> Version:
        """Set and remove tags of a version; raises UsageError when there is none such, or a tag is not usable."""
        require_tags(given)
        with self._database.writing() as connection:
            row = self._row(connection, model, wanted)
            mine = tags.c.version_id == row.id
            connection.execute(tags.delete().where(mine, tags.c.key.in_([*given, *removed])))
            for key, value in given.items():
                connection.execute(tags.insert().values(version_id=row.id, key=key, value=value))
            return self._version(connection, model, row.version)

    def add_evaluation(self, version: Version, data: str, metrics: Mapping[str, float]) -> Version:
        """Keep figures of a version on a data set, beside those it has; raises UsageError."""
        require_data_name(data)
        with self._database.writing() as connection:
            row = self._row(connection, version.model, version.version)
            values = {"version_id": row.id, "data": data, "metrics": finite(metrics), "evaluated_at": time.time()}
            connection.execute(evaluations.insert().values(values))
            return self._version(connection, version.model, version.version)

    def sweep(self, grace: float = GRACE_S, remove: bool = True) -> list[str]:
        """Remove what interrupted registrations left.

        Args:
            grace: seconds that it must have been there; at least as long as an upload takes.
            remove: False only looks.

        Returns:
            Names of the blobs that no version has.

        Raises:
            StorageError: the database or the blobs cannot be reached.
        """
        swept = []
        for blob in self._vault.blobs.older_than(grace):
            with self._database.writing() as connection:  # nobody registers it at the same time
                if connection.scalar(select(func.count()).where(versions.c.blob == blob)):
                    continue
                if remove:
                    self._vault.blobs.delete(blob)
                swept.append(blob)
        return swept

    def _row(self, connection: Connection, model: str, wanted: int | str) -> Row[Any]:
        return row_of(connection, require_name(model), wanted, self.name)

    def _version(self, connection: Connection, model: str, wanted: int | str) -> Version:
        row = self._row(connection, model, wanted)
        return records_of(connection, versions.c.id == row.id)[0]

    def _add(self, connection: Connection, model: str, digest: bytes, size: int, lineage: Lineage) -> int:
        """The commit point of a registration."""
        if lineage.parent is not None:
            self._row(connection, model, lineage.parent)
        last = connection.scalar(select(func.max(versions.c.version)).where(versions.c.model == model))
        row = {
            "model": model,
            "version": (last or 0) + 1,
            "digest": digest.hex(),
            "blob": self._vault.name_of(digest),
            "size": size,
            "created_at": time.time(),
            **asdict(lineage),
        }
        connection.execute(versions.insert().values(row))
        return (last or 0) + 1


def _registered_before(connection: Connection, model: str, digest: bytes, lineage: Lineage) -> int | None:
    """The version that this file of this run and round is already."""
    if lineage.run_id is None:
        return None
    same = (
        versions.c.model == model,
        versions.c.digest == digest.hex(),
        versions.c.run_id == lineage.run_id,
        versions.c.round == lineage.round,
    )
    known: int | None = connection.scalar(select(func.min(versions.c.version)).where(*same))
    return known


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"cannot make a registry in {folder}: {error.strerror}") from None


def _make_in(folder: Path, database: Database, blobs: str | None) -> None:
    with locked(folder / _LOCK):
        if not database.exists:  # the key first: a crash leaves one that the next try takes
            database.create(place_of(blobs) if blobs else "", load_or_make_key(folder).check())

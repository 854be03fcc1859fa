"""The files of a registry: each is stored before the row that names it, and swept where no row does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, func, select

from propolis.secure.errors import StorageError, UsageError
from propolis.secure.manifest import Kind, is_file_name
from propolis.server.at_rest import RegistryKey
from propolis.server.registry_authentic import code_of_artifact
from propolis.server.registry_database import Database
from propolis.server.registry_tables import artifacts, versions
from propolis.server.vault import Vault, digest_of

_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """A file to attach to a version: its name, what it is for, and its content or where that is."""

    name: str
    kind: Kind
    content: Path | bytes

    def __post_init__(self) -> None:
        if not is_file_name(self.name):
            raise UsageError(f"{self.name[:120]!r} is no name for a file: letters, digits, dot, - and _, at most 100")


class Files:
    """The files of one registry.

    Args:
        database: with the rows that name them.
        vault: that they lie in.
        key: that says who wrote those rows.
    """

    def __init__(self, database: Database, vault: Vault, key: RegistryKey) -> None:
        self._database, self._vault, self._key = database, vault, key

    def commit(self, files: Sequence[tuple[Path | bytes, bytes]], add: Callable[[Connection], T]) -> T:
        """Store files, and then add the rows that name them, all or none.

        Args:
            files: each with its SHA-256.
            add: adds the rows, in a writer's transaction.

        Returns:
            What `add` does.

        Raises:
            UsageError: a file has changed since its digest was taken, or what `add` raises.
            StorageError: something could not be written.
        """
        for _ in range(_TRIES):
            for file, digest in files:
                self._vault.store(file, digest)
            with self._database.writing() as connection:
                # A sweep may have come between, but none does now: it is a writer, too.
                if all(self._vault.holds(digest) for _, digest in files):
                    return add(connection)
        raise StorageError(f"{self._database.name}: the files were swept as soon as they were stored, {_TRIES} times")

    def attach(
        self,
        wanted: Sequence[NewArtifact],
        find: Callable[[Connection], Row[Any]],
        then: Callable[[Connection, int], T],
    ) -> T:
        """Attach files to a version, all or none; one that it has already stays as it is.

        Args:
            wanted: the files.
            find: returns the version's row.
            then: is called with the version's id after it, in the same transaction.

        Returns:
            What `then` does.

        Raises:
            UsageError: the version has another file of such a name, or one cannot be read.
            StorageError: they could not be stored.
        """
        measured = [(each, *digest_of(each.content)) for each in wanted]

        def add(connection: Connection) -> T:
            version = find(connection)
            for each, digest, size in measured:
                self._add(connection, version, each, digest, size)
            return then(connection, version.id)

        return self.commit([(each.content, digest) for each, digest, _ in measured], add)

    def read(self, digest: str, name: object) -> Iterator[bytes]:
        """A file by its digest in hexadecimal, in chunks; see `Vault.read`, whose errors say `name`."""
        try:
            yield from self._vault.read(bytes.fromhex(digest))
        except UsageError as error:
            raise type(error)(f"{name} cannot be read: {error}") from None

    def sweep(self, grace: float, remove: bool) -> list[str]:
        """See `Registry.sweep`."""
        swept = []
        for blob in self._vault.blobs.older_than(grace):
            with self._database.writing() as connection:  # nobody names it at the same time
                if _is_named(connection, blob):
                    continue
                if remove:
                    self._vault.blobs.delete(blob)
                swept.append(blob)
        return swept

    def _add(self, connection: Connection, version: Row[Any], new: NewArtifact, digest: bytes, size: int) -> None:
        mine = (artifacts.c.version_id == version.id, func.lower(artifacts.c.name) == new.name.lower())
        known = connection.execute(select(artifacts).where(*mine)).one_or_none()
        if known is not None:
            if (known.name, known.digest, known.kind) == (new.name, digest.hex(), new.kind.name.lower()):
                return
            raise UsageError(f"the version has a file {known.name} already, and what it has is never changed")
        said = (new.name, new.kind.name.lower(), digest.hex(), size)
        row = {
            "version_id": version.id,
            **dict(zip(("name", "kind", "digest", "size"), said, strict=True)),
            "blob": self._vault.name_of(digest),
            "code": code_of_artifact(self._key, version.model, version.version, *said),
        }
        connection.execute(artifacts.insert().values(row))


def _is_named(connection: Connection, blob: str) -> bool:
    tables = (versions, artifacts)
    return any(connection.scalar(select(func.count()).where(table.c.blob == blob)) for table in tables)

"""The database of a registry: a SQLite file or PostgreSQL, one writer at a time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from propolis.secure.errors import StorageError, UsageError
from propolis.server.at_rest import RegistryKey
from propolis.server.registry_migrations import STEPS, migrate, schema_of
from propolis.server.registry_tables import SCHEMA, metadata, registries
from propolis.server.urls import without_secrets

DATABASE_FILE = "registry.db"
_WAIT_S = 30  # that a writer waits for another one
_CREATION_LOCK = 0x70726F706F6C6973  # of PostgreSQL's advisory locks: "propolis"


class Database:
    """Connections to one registry's tables.

    Args:
        location: a folder, or a URL of PostgreSQL.

    Raises:
        UsageError: it is another URL, or PostgreSQL's driver is not installed.
    """

    def __init__(self, location: str) -> None:
        self.folder = None if "://" in location else Path(location)
        url = URL.create("sqlite", database=str(self.folder / DATABASE_FILE)) if self.folder else _postgres(location)
        shown = url.difference_update_query(list(url.query)).set(drivername="postgresql")
        self.name = str(self.folder or shown.render_as_string(hide_password=True))
        self._is_sqlite = self.folder is not None
        self._engine = _engine(url)

    @property
    def exists(self) -> bool:
        """Whether somebody made a registry here."""
        if self.folder is not None and not (self.folder / DATABASE_FILE).is_file():
            return False  # SQLite would make the file
        with self.reading() as connection:
            return self._has_tables(connection)

    def create(self, blobs: str, key_check: str) -> None:
        """Make the tables, unless somebody has; once at a time, so that two who begin together make one registry.

        Raises:
            StorageError: the database cannot be written.
        """
        if self.folder is not None:
            self._read_beside_a_writer(self.folder / DATABASE_FILE)
        with self._transaction() as connection:
            if not self._is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _CREATION_LOCK})
            if self._has_tables(connection):
                return
            metadata.create_all(connection)
            row = {"id": 1, "schema_version": SCHEMA, "blobs": blobs, "key_check": key_check}
            connection.execute(registries.insert().values(row))

    def require_made(self) -> None:
        """Raises UsageError where there is no registry."""
        if not self.exists:
            raise UsageError(f"there is no registry in {self.name}: propolis models init makes one")

    def opened(self, key: RegistryKey) -> str:
        """Where the blobs are; an older registry becomes one of this version first, if the key is its own.

        Raises:
            UsageError: the key is another one's, or the tables are of a version that this one does not know.
        """
        with self.reading() as connection:
            if connection.scalar(select(registries.c.key_check)) != key.check():
                raise UsageError(f"the key is not that of the registry in {self.name}")
            is_old = schema_of(connection) in STEPS
        if is_old:
            with self.writing() as connection:  # somebody else may have come before
                migrate(connection, key)
        with self.reading() as connection:
            schema = schema_of(connection)
            if schema != SCHEMA:
                older = "an older" if schema is not None and schema < SCHEMA else "a newer"
                raise UsageError(
                    f"the registry in {self.name} has schema {schema}, this version of Propolis reads {SCHEMA}: "
                    f"it was made by {older} one"
                )
            blobs: str = connection.execute(select(registries.c.blobs)).scalar_one()
            return blobs

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the registry; raises StorageError."""
        with self._reporting(), self._engine.begin() as connection:
            if not self._is_sqlite:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer is beside; raises StorageError."""
        with self._transaction() as connection:
            connection.execute(select(registries.c.id).with_for_update())
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._reporting(), self._engine.execution_options(writes=True).begin() as connection:
            if not self._is_sqlite:
                # Whatever the database's default is: who has waited for the lock must see what was done meanwhile.
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE"))
                connection.execute(text(f"SET LOCAL lock_timeout = '{_WAIT_S}s'"))
            yield connection

    def _read_beside_a_writer(self, file: Path) -> None:
        """SQLite's write-ahead log, which stays with the file; not to be switched on inside of a transaction."""
        try:
            with closing(sqlite3.connect(file, timeout=_WAIT_S)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.Error as error:
            raise StorageError(f"cannot make a registry in {self.name}: {error}") from None

    @staticmethod
    def _has_tables(connection: Connection) -> bool:
        return inspect(connection).has_table(registries.name)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """One line for what goes wrong in the database; the statement and its values are nobody's business."""
        try:
            yield
        except SQLAlchemyError as error:
            said = str(getattr(error, "orig", None) or error).strip().splitlines()
            first = without_secrets(said[0]) if said else type(error).__name__
            raise StorageError(f"the registry in {self.name}: {first}") from None


def _postgres(location: str) -> URL:
    try:
        url = make_url(location)
    except (ArgumentError, ValueError):
        raise UsageError("the registry's URL cannot be read: expected postgresql://USER@HOST/DATABASE") from None
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise UsageError(f"a registry is a folder or a URL of PostgreSQL (postgresql://...), not {url.drivername}")
    return url.set(drivername="postgresql+psycopg")


def _engine(url: URL) -> Engine:
    is_sqlite = url.drivername == "sqlite"
    arguments: dict[str, Any] = {"timeout": _WAIT_S} if is_sqlite else {"connect_timeout": _WAIT_S}
    try:
        # No pool: connections are few, and none is shared by threads or taken along into a forked process.
        engine = create_engine(
            url, poolclass=NullPool, connect_args=arguments, json_serializer=partial(json.dumps, allow_nan=False)
        )
    except ModuleNotFoundError:
        raise UsageError("PostgreSQL needs a driver: pip install 'propolis[postgres]'") from None
    if is_sqlite:
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: DBAPIConnection, _: object) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin` and not by the driver
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.cursor().execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """A writer takes SQLite's lock at once: one that reads first and writes later would be told "locked" unheard."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

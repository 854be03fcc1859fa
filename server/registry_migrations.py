"""What leads from the tables of one schema to those of the next.

The statements are written out, and stay as they are when the tables of `registry_tables` go on: who has an old registry
takes all steps after another. SQLite and PostgreSQL both undo them with the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, select, text

from propolis.server.at_rest import RegistryKey
from propolis.server.registry_authentic import code_of_version
from propolis.server.registry_history import lineage_of
from propolis.server.registry_records import Format
from propolis.server.registry_tables import SCHEMA, registries, versions

_SERIAL = {"sqlite": "INTEGER NOT NULL PRIMARY KEY", "postgresql": "SERIAL NOT NULL PRIMARY KEY"}

# By the schema that they lead from; {serial} is a number that the database gives.
STEPS: Mapping[int, Sequence[str]] = {
    1: (
        """
        CREATE TABLE propolis_artifact (
            id {serial},
            version_id INTEGER NOT NULL REFERENCES propolis_version (id),
            name VARCHAR(100) NOT NULL,
            kind VARCHAR(16) NOT NULL,
            digest VARCHAR(64) NOT NULL,
            blob VARCHAR(64) NOT NULL,
            size BIGINT NOT NULL,
            code VARCHAR(64) NOT NULL,
            UNIQUE (version_id, name)
        )
        """,
        "CREATE INDEX ix_propolis_artifact_blob ON propolis_artifact (blob)",
        """
        CREATE TABLE propolis_sequence (
            model VARCHAR(64) NOT NULL,
            sequence BIGINT NOT NULL,
            taken_at FLOAT(53) NOT NULL,
            PRIMARY KEY (model, sequence)
        )
        """,
        """
        CREATE TABLE propolis_release (
            id {serial},
            version_id INTEGER NOT NULL REFERENCES propolis_version (id),
            model VARCHAR(64) NOT NULL,
            sequence BIGINT NOT NULL,
            manifest VARCHAR(64) NOT NULL,
            content_key VARCHAR(256) NOT NULL,
            created_at FLOAT(53) NOT NULL,
            expires_at FLOAT(53) NOT NULL,
            parent BIGINT NOT NULL,
            UNIQUE (model, sequence),
            UNIQUE (manifest)
        )
        """,
        "CREATE INDEX ix_propolis_release_version_id ON propolis_release (version_id)",
        "ALTER TABLE propolis_version ADD COLUMN code VARCHAR(64)",
        "ALTER TABLE propolis_evaluation ADD COLUMN artifact VARCHAR(100)",
    ),
    2: ("ALTER TABLE propolis_version ADD COLUMN format VARCHAR(16)",),
}


def schema_of(connection: Connection) -> int | None:
    """The schema of a registry's tables, whatever it is."""
    found: int | None = connection.scalar(text("SELECT schema_version FROM propolis_registry"))
    return found


def migrate(connection: Connection, key: RegistryKey) -> None:
    """Lead the tables to `SCHEMA`, where there is a way; the transaction is a writer's, and the key the registry's."""
    schema = before = schema_of(connection)
    while schema is not None and schema in STEPS and schema < SCHEMA:
        for statement in STEPS[schema]:
            connection.execute(text(statement.format(serial=_SERIAL[connection.dialect.name])))
        schema += 1
        connection.execute(registries.update().values(schema_version=schema))
    if before == 1:
        _authenticate(connection, key)


def _authenticate(connection: Connection, key: RegistryKey) -> None:
    """Take what is said of the versions for true, from now on."""
    for row in connection.execute(select(versions)).all():
        code = code_of_version(key, row.model, row.version, row.digest, row.size, lineage_of(row), Format.SAFETENSORS)
        connection.execute(versions.update().where(versions.c.id == row.id).values(code=code))

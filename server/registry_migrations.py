"""What leads from the tables of one schema to those of the next.

The statements are written out, and stay as they are when the tables of `registry_tables` go on: who has an old registry
takes all steps after another. SQLite and PostgreSQL both undo them with the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, text

from propolis.server.registry_tables import SCHEMA, registries

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
    ),
}


def schema_of(connection: Connection) -> int | None:
    """The schema of a registry's tables, whatever it is."""
    found: int | None = connection.scalar(text("SELECT schema_version FROM propolis_registry"))
    return found


def migrate(connection: Connection) -> None:
    """Lead the tables to `SCHEMA`, where there is a way; the transaction is a writer's."""
    schema = schema_of(connection)
    while schema is not None and schema in STEPS and schema < SCHEMA:
        for statement in STEPS[schema]:
            connection.execute(text(statement.format(serial=_SERIAL[connection.dialect.name])))
        schema += 1
        connection.execute(registries.update().values(schema_version=schema))

"""The tables of a registry. What is added is never changed, but for tags: history is what a registry is for."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

# Of these tables: a change of them is a new number, and brings the statements that lead to it (`registry_migrations`).
SCHEMA = 3

metadata = MetaData()

# One row, which also is the lock that writers take.
registries = Table(
    "propolis_registry",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    Column("blobs", Text, nullable=False),  # where they are; empty: beside the database
    Column("key_check", String(32), nullable=False),  # tells a wrong key, see `RegistryKey.check`
)

versions = Table(
    "propolis_version",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("model", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the plaintext
    Column("blob", String(64), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),  # bytes of the plaintext
    Column("created_at", Float(53), nullable=False),  # seconds since 1970, UTC
    Column("federation", String(64)),
    Column("run_id", String(64)),
    Column("round", Integer),
    Column("parent", Integer),
    Column("configuration", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("uplink_bytes", BigInteger),
    Column("downlink_bytes", BigInteger),
    Column("survivors", Integer),
    Column("code", String(64)),  # `code_of_version`; one without is refused
    Column("format", String(16)),  # a value of `Format`; nothing is safetensors
    UniqueConstraint("model", "version"),
)

# An alias is at the version of its last row; `before` is the row that a rollback goes back to.
alias_changes = Table(
    "propolis_alias_change",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", ForeignKey(versions.c.id), nullable=False),
    Column("model", String(64), nullable=False),
    Column("alias", String(64), nullable=False),
    Column("before", Integer),
    Column("changed_at", Float(53), nullable=False),
)

tags = Table(
    "propolis_tag",
    metadata,
    Column("version_id", ForeignKey(versions.c.id), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

evaluations = Table(
    "propolis_evaluation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", ForeignKey(versions.c.id), nullable=False, index=True),
    Column("data", String(200), nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("evaluated_at", Float(53), nullable=False),
    Column("artifact", String(100)),  # that was evaluated, and not the version's own file
)

# Further files of a version, such as the ONNX models that were made of it.
artifacts = Table(
    "propolis_artifact",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", ForeignKey(versions.c.id), nullable=False),
    Column("name", String(100), nullable=False),
    Column("kind", String(16), nullable=False),  # a name of `propolis.secure.manifest.Kind`, in lower case
    Column("digest", String(64), nullable=False),  # SHA-256 of the plaintext
    Column("blob", String(64), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),  # bytes of the plaintext
    Column("code", String(64), nullable=False),  # `code_of_artifact`
    UniqueConstraint("version_id", "name"),
)

# The numbers of releases that somebody took; one without a release was left by who was interrupted.
sequences = Table(
    "propolis_sequence",
    metadata,
    Column("model", String(64), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("taken_at", Float(53), nullable=False),
)

releases = Table(
    "propolis_release",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version_id", ForeignKey(versions.c.id), nullable=False, index=True),
    Column("model", String(64), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("manifest", String(64), nullable=False, unique=True),  # digest of the manifest
    Column("content_key", String(256), nullable=False),  # encrypted under the registry's key, in hexadecimal
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("parent", BigInteger, nullable=False),  # the sequence before; 0 is none
    UniqueConstraint("model", "sequence"),
)

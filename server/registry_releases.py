"""The releases of a registry's versions, inside of a transaction: their numbers and their content keys."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from propolis.server.at_rest import RegistryKey
from propolis.server.registry_tables import releases, sequences


@dataclass(frozen=True, slots=True, repr=False)
class NewRelease:
    """A release that was sealed.

    Attributes:
        sequence: from `Registry.next_sequence`.
        manifest: the digest of its manifest.
        content_key: that opens it.
        created, expires: seconds since 1970.
        parent: the sequence before; 0 is none.
    """

    sequence: int
    manifest: bytes
    content_key: bytes
    created: float
    expires: float
    parent: int


def take_sequence(connection: Connection, model: str) -> tuple[int, int]:
    """A number that no release of this model had or will have, and the number of its last release, or 0."""
    taken = connection.scalar(select(func.max(sequences.c.sequence)).where(sequences.c.model == model)) or 0
    last = connection.scalar(select(func.max(releases.c.sequence)).where(releases.c.model == model)) or 0
    row = {"model": model, "sequence": taken + 1, "taken_at": time.time()}
    connection.execute(sequences.insert().values(row))
    return taken + 1, last


def add_release(connection: Connection, key: RegistryKey, version_id: int, model: str, new: NewRelease) -> None:
    """Keep a release, its content key under the registry's."""
    row = {
        "version_id": version_id,
        "model": model,
        "sequence": new.sequence,
        "manifest": new.manifest.hex(),
        "content_key": key.seal_released(new.content_key, new.manifest).hex(),
        "created_at": new.created,
        "expires_at": new.expires,
        "parent": new.parent,
    }
    connection.execute(releases.insert().values(row))


def content_key_of(connection: Connection, key: RegistryKey, manifest: bytes) -> bytes | None:
    """The content key of a release; raises UsageError where it is damaged."""
    kept = connection.scalar(select(releases.c.content_key).where(releases.c.manifest == manifest.hex()))
    return None if kept is None else key.open_released(bytes.fromhex(kept), manifest)

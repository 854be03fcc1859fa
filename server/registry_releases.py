"""The releases of a registry's versions, inside of a transaction: their numbers and their content keys."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from propolis.secure.errors import UsageError
from propolis.secure.release import LARGEST_NUMBER
from propolis.server.at_rest import RegistryKey
from propolis.server.registry_tables import releases, sequences


@dataclass(frozen=True, slots=True)
class Demand:
    """What the number of a release must be.

    Attributes:
        at_least: smaller ones are left out.
        above: the newest release that was given out; a number that is not larger is refused.
    """

    at_least: int = 1
    above: int = 0


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


def take_sequence(connection: Connection, model: str, demand: Demand) -> tuple[int, int]:
    """A number that no release of this model had or will have, and the number of its last release, or 0.

    Raises:
        UsageError: the number is not above what was given out, or larger than any may be.
    """
    taken = connection.scalar(select(func.max(sequences.c.sequence)).where(sequences.c.model == model)) or 0
    last = connection.scalar(select(func.max(releases.c.sequence)).where(releases.c.model == model)) or 0
    sequence = max(taken + 1, last + 1, demand.at_least)
    if sequence <= demand.above:
        raise UsageError(
            f"this would be release {sequence} of {model}, and the devices were given {demand.above}: the registry "
            f"does not know of that; give --sequence-at-least {demand.above + 1}"
        )
    if sequence > LARGEST_NUMBER:
        raise UsageError(f"release {sequence} of {model}: {LARGEST_NUMBER} is the largest number")
    row = {"model": model, "sequence": sequence, "taken_at": time.time()}
    connection.execute(sequences.insert().values(row))
    return sequence, last


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

"""A device's keys of homomorphic encryption on its disk.

he.key          the newest, `KeyBundle` of protos/he.proto
he.former       those before it, for as long as models under them may come: `FormerKeys` of protos/he_key.proto

The secret parts are sealed to the device, as they came, so that the files are worth nothing without its state. They are
under the device's passphrase where it has one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from propolis.client.seal import Seal, read_sealed, write_sealed
from propolis.protos import he_key_pb2
from propolis.secure.errors import PeerError, StorageError
from propolis.secure.he.held import LARGEST_BUNDLE
from propolis.secure.wire import decode, encode, sized, version_field
from propolis.storage import remove_stale

HE_KEY_FILE, HE_FORMER_FILE = "he.key", "he.former"
# Where more were made without a round between them, models under the oldest cannot be opened any more.
MOST_FORMER = 4


@dataclass(frozen=True, slots=True, repr=False)
class FormerKeys:
    """Keys of homomorphic encryption that a device had before, each a `KeyBundle`, the newest first."""

    bundles: tuple[bytes, ...] = sized(1, LARGEST_BUNDLE, count=MOST_FORMER)
    version: int = version_field()


def has_he_key(folder: Path) -> bool:
    """Whether there is a key in a device's folder, whatever it is worth: nothing is opened."""
    return os.path.lexists(folder / HE_KEY_FILE)


def read_he_keys(folder: Path, seal: Seal | None) -> tuple[bytes, ...]:
    """The keys in a device's folder, the newest first, each once; raises StorageError where a file cannot be read."""
    newest, former = folder / HE_KEY_FILE, folder / HE_FORMER_FILE
    if not newest.exists():
        return ()
    found = [read_sealed(newest, seal)]
    if former.exists():
        try:
            kept = decode(FormerKeys, read_sealed(former, seal), he_key_pb2.FormerKeys, MOST_FORMER * LARGEST_BUNDLE)
        except PeerError:
            raise StorageError(f"{former} is damaged: remove it") from None
        found += [bundle for bundle in kept.bundles if bundle not in found]
    return tuple(found)


def write_he_keys(folder: Path, seal: Seal | None, newest: bytes, former: Sequence[bytes]) -> None:
    """Keep a key in a device's folder, and some before it; no crash at any instant loses one that was there.

    Raises:
        StorageError: a file could not be written.
    """
    kept = tuple(bundle for bundle in former if bundle != newest)[:MOST_FORMER]
    for name, data in ((HE_FORMER_FILE, encode(FormerKeys(kept), he_key_pb2.FormerKeys)), (HE_KEY_FILE, newest)):
        remove_stale(folder / name)
        if kept or name == HE_KEY_FILE:
            write_sealed(folder / name, data, seal)


def forget_former_keys(folder: Path) -> None:
    """Remove all keys but the newest; a file that cannot be removed is left for the next time."""
    remove_stale(folder / HE_FORMER_FILE)
    with suppress(OSError):
        (folder / HE_FORMER_FILE).unlink(missing_ok=True)

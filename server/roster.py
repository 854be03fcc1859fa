"""The federation as the server keeps it on disk: what its root signed, and nothing secret."""

from __future__ import annotations

from pathlib import Path

from propolis.protos import identity_pb2 as pb
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.identity import Signed, TrustedRoster
from propolis.secure.wire import decode, encode
from propolis.storage import write_atomically

ROOT_FILE, ROSTER_FILE = "root.pub", "roster.bin"
_LARGEST_FILE = 2**27


def save_roster(folder: Path, root_key: bytes, roster: Signed) -> None:
    """Write the root's public key and the signed roster; raises StorageError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ROOT_FILE, root_key.hex().encode() + b"\n")
    replace_roster(folder, roster)


def replace_roster(folder: Path, roster: Signed) -> None:
    """Write a newer roster; raises StorageError."""
    write_atomically(folder / ROSTER_FILE, encode(roster, pb.Signed))


def load_roster(folder: Path) -> TrustedRoster:
    """The roster in a folder that `save_roster` wrote.

    Raises:
        UsageError: a file is missing, damaged, or not signed by this root.
    """
    return load_roster_of(load_root(folder), folder)


def load_root(folder: Path) -> bytes:
    """The root's public key, 32 bytes; raises UsageError."""
    try:
        return bytes.fromhex((folder / ROOT_FILE).read_text(encoding="ascii"))
    except OSError as error:
        raise UsageError(f"{folder} holds no federation: cannot read {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"the federation in {folder} does not hold: {error}") from None


def load_roster_of(root_key: bytes, folder: Path) -> TrustedRoster:
    """The roster in a folder, which must be that of a root that is known already; raises UsageError."""
    try:
        signed = decode(Signed, (folder / ROSTER_FILE).read_bytes(), pb.Signed, _LARGEST_FILE)
        return TrustedRoster(root_key, signed)
    except OSError as error:
        raise UsageError(f"{folder} holds no federation: cannot read {error.filename}: {error.strerror}") from None
    except PropolisError as error:
        raise UsageError(f"the federation in {folder} does not hold: {error}") from None

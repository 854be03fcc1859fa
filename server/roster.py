"""The federation as the server keeps it on disk: what its root signed, and nothing secret."""

from __future__ import annotations

from pathlib import Path

from propolis.protos import identity_pb2 as pb
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.identity import Signed, TrustedRoster
from propolis.secure.wire import decode, encode
from propolis.storage import write_atomically

ROOT_FILE, ROSTER_FILE = "root.pub", "roster.bin"


def save_roster(folder: Path, root_key: bytes, roster: Signed) -> None:
    """Write the root's public key and the signed roster; raises StorageError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ROOT_FILE, root_key.hex().encode() + b"\n")
    write_atomically(folder / ROSTER_FILE, encode(roster, pb.Signed))


def load_roster(folder: Path) -> TrustedRoster:
    """The roster in a folder that `save_roster` wrote.

    Raises:
        UsageError: a file is missing, damaged, or not signed by this root.
    """
    try:
        root_key = bytes.fromhex((folder / ROOT_FILE).read_text(encoding="ascii"))
        signed = decode(Signed, (folder / ROSTER_FILE).read_bytes(), pb.Signed, 2**27)
        return TrustedRoster(root_key, signed)
    except OSError as error:
        raise UsageError(f"{folder} holds no federation: cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, PropolisError) as error:
        raise UsageError(f"the federation in {folder} does not hold: {error}") from None

"""Where the key of a registry comes from: the environment, or a file that only its owner may read."""

from __future__ import annotations

import os
from pathlib import Path

from propolis.link.keys import read_private
from propolis.secure.errors import UsageError
from propolis.server.at_rest import KEY_BYTES, RegistryKey
from propolis.storage import write_once

KEY_VARIABLE = "PROPOLIS_REGISTRY_KEY"
KEY_FILE_VARIABLE = "PROPOLIS_REGISTRY_KEY_FILE"
KEY_FILE = "registry.key"


def key_file_of(folder: Path | None) -> Path | None:
    """The file that holds the key: what PROPOLIS_REGISTRY_KEY_FILE names, else the one in the registry's folder."""
    if named := os.environ.get(KEY_FILE_VARIABLE):
        return Path(named)
    return folder / KEY_FILE if folder else None


def key_in_use(folder: Path | None) -> str:
    """Where `load_key` takes the key from."""
    return KEY_VARIABLE if KEY_VARIABLE in os.environ else str(key_file_of(folder))


def load_key(folder: Path | None) -> RegistryKey:
    """The key of a registry: PROPOLIS_REGISTRY_KEY in hexadecimal, else the file of `key_file_of`.

    Args:
        folder: of the registry; None where it has none.

    Raises:
        UsageError: there is no key, it is malformed, or others may read its file.
    """
    if (said := os.environ.get(KEY_VARIABLE)) is not None:
        return _parse(said, KEY_VARIABLE)
    path = key_file_of(folder)
    if path is None or not path.exists():
        put_back = f"{path} is not there; put it back, or " if path else ""
        raise UsageError(
            f"the registry's key is missing: {put_back}set {KEY_VARIABLE} ({2 * KEY_BYTES} hexadecimal digits) or "
            f"{KEY_FILE_VARIABLE}"
        )
    return _parse(read_private(path).decode("ascii", "replace"), str(path))


def load_or_make_key(folder: Path | None) -> RegistryKey:
    """The key for a registry that is being made: one that is there, else a new one in a new file.

    Raises:
        UsageError: as `load_key` does.
        StorageError: the file could not be written.
    """
    path = key_file_of(folder)
    if KEY_VARIABLE not in os.environ and path is not None and not path.exists():
        write_once(path, os.urandom(KEY_BYTES).hex().encode() + b"\n", mode=0o600)  # of two at once the first
    return load_key(folder)


def _parse(text: str, where: str) -> RegistryKey:
    try:
        return RegistryKey(bytes.fromhex(text.strip()))
    except (ValueError, UsageError):
        raise UsageError(f"{where} holds no registry's key: expected {2 * KEY_BYTES} hexadecimal digits") from None

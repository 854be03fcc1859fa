"""Private keys in files: PEM, for their owner alone, encrypted where there is a passphrase."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from propolis.secure.errors import UsageError
from propolis.secure.identity import SigningKey
from propolis.storage import remove_stale, write_atomically

PASSPHRASE_VARIABLE = "PROPOLIS_PASSPHRASE"  # noqa: S105, the name and no passphrase
_LARGEST_FILE = 2**16
_LONGEST_PASSPHRASE = 1023  # bytes; OpenSSL's limit


def passphrase_of(file: Path | None) -> bytes | None:
    """The passphrase in a file, else in the environment variable PROPOLIS_PASSPHRASE, else none.

    Args:
        file: its first line is the passphrase.

    Raises:
        UsageError: the file cannot be read, others may read it, or the passphrase is empty, too long or no text.
    """
    if file is None:
        passphrase, where = os.environb.get(PASSPHRASE_VARIABLE.encode()), PASSPHRASE_VARIABLE
    else:
        passphrase, where = read_private(file).split(b"\n")[0].rstrip(b"\r"), str(file)
    if passphrase is not None:
        _require_text(passphrase, where)
    return passphrase


def _require_text(passphrase: bytes, where: str) -> None:
    """What a person can type: it goes into an environment variable, and into libraries that take no more."""
    if not passphrase:
        raise UsageError(f"the passphrase in {where} is empty")
    if len(passphrase) > _LONGEST_PASSPHRASE:
        raise UsageError(f"the passphrase in {where} has {len(passphrase)} bytes, at most {_LONGEST_PASSPHRASE} can be")
    try:
        is_text = "\0" not in passphrase.decode()
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        raise UsageError(f"the passphrase in {where} is no text (UTF-8): write another one there")


def encode_private_key(key: Any, passphrase: bytes | None = None) -> bytes:
    """A private key of `cryptography` as PEM (PKCS #8), encrypted where there is a passphrase."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return pem


def save_private_key(path: Path, key: Any, passphrase: bytes | None = None) -> None:
    """Write a private key that only its owner may read; raises StorageError."""
    remove_stale(path)
    write_atomically(path, encode_private_key(key, passphrase), mode=0o600)


def load_tls_key(path: Path, passphrase: bytes | None = None) -> EllipticCurvePrivateKey:
    """The ECDSA key in a file; raises as `load_private_key` does."""
    key = load_private_key(path, passphrase)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UsageError(f"{path} is not a key for TLS (ECDSA)")
    return key


def load_signing_key(path: Path, passphrase: bytes | None = None) -> SigningKey:
    """The Ed25519 key in a file; raises as `load_private_key` does."""
    key = load_private_key(path, passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is not a key for signatures (Ed25519)")
    return SigningKey(key.private_bytes_raw())


def load_private_key(path: Path, passphrase: bytes | None = None) -> PrivateKeyTypes:
    """The private key in a file.

    Args:
        path: the file.
        passphrase: that it is encrypted with.

    Raises:
        UsageError: it is missing, others may read it, the passphrase is wrong or missing, or it is no key.
    """
    data = read_private(path)
    # What is encrypted says so; the library's message for a wrong passphrase is the same as for a damaged file.
    if b"ENCRYPTED" in data.split(b"\n")[0] and passphrase is None:
        raise UsageError(f"{path} is encrypted: give --passphrase-file, or set {PASSPHRASE_VARIABLE}")
    try:
        return serialization.load_pem_private_key(data, passphrase)
    except TypeError:  # a passphrase for a key that needs none
        raise UsageError(f"{path} is not encrypted, but there is a passphrase: leave it out") from None
    except (ValueError, UnsupportedAlgorithm):
        hint = "" if passphrase is None else "the passphrase is wrong, or "
        raise UsageError(f"{path} cannot be opened: {hint}it holds no private key") from None


def read_private(path: Path) -> bytes:
    """A file that nobody but its owner may read, who is this user or root.

    Raises:
        UsageError: it cannot be read, it is no regular file, it is another user's, others may read it, or it is too
            large.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            _require_private(path, os.fstat(file.fileno()))
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > _LARGEST_FILE:
        raise UsageError(f"{path} is larger than a key can be")
    return data


def _without_waiting(path: str, flags: int) -> int:
    """A named pipe opens when somebody writes to it, and otherwise never."""
    return os.open(path, flags | os.O_NONBLOCK)


def _require_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path} is a pipe, a device or the like: write the secret into a regular file")
    if found.st_uid not in (os.geteuid(), 0):
        raise UsageError(f"{path} belongs to user {found.st_uid}, who may change this secret: run this as that user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise UsageError(f"others may read {path}, which is a secret: chmod 600 {path}")

"""A device's state at rest, encrypted under a passphrase (AES-256-GCM, NIST SP 800-38D; scrypt, RFC 7914)."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from propolis.secure.errors import StorageError
from propolis.storage import write_atomically

# The last byte is the version: of the format and of the parameters of scrypt.
_MAGIC = b"propolis sealed\x01"
_SALT_BYTES, _NONCE_BYTES = 16, 12
_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES
_BODY = _HEADER_BYTES + _NONCE_BYTES
# 32 MiB of memory, which a small device has; the passes make up for what a larger block would cost an attacker.
_COST, _BLOCK, _PASSES = 2**15, 8, 3


class Seal:
    """Closes and opens bytes; derives its key once, which takes a moment.

    Args:
        passphrase: what the key is derived from.
    """

    def __init__(self, passphrase: bytes) -> None:
        self._passphrase = passphrase
        self._salt = b""
        self._cipher: AESGCM | None = None

    def close(self, data: bytes) -> bytes:
        """The data, encrypted and authenticated."""
        salt, nonce = self._salt or os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
        header = _MAGIC + salt
        return header + nonce + self._cipher_under(salt).encrypt(nonce, data, header)

    def open(self, sealed: bytes) -> bytes:
        """What `close` was given.

        Raises:
            StorageError: the data are not sealed, or damaged, or under another passphrase.
        """
        if not is_sealed(sealed):
            raise StorageError("the device's state is not encrypted, but there is a passphrase: leave it out")
        header, nonce, rest = sealed[:_HEADER_BYTES], sealed[_HEADER_BYTES:_BODY], sealed[_BODY:]
        try:
            return self._cipher_under(header[len(_MAGIC) :]).decrypt(nonce, rest, header)
        except (InvalidTag, ValueError):
            raise StorageError("the device's state cannot be opened: wrong passphrase, or damaged") from None

    def _cipher_under(self, salt: bytes) -> AESGCM:
        if self._cipher is None or salt != self._salt:
            key = Scrypt(salt=salt, length=32, n=_COST, r=_BLOCK, p=_PASSES).derive(self._passphrase)
            self._salt, self._cipher = salt, AESGCM(key)
        return self._cipher


def is_sealed(data: bytes) -> bool:
    """Whether data are what a `Seal` closed."""
    return data.startswith(_MAGIC)


def write_sealed(path: Path, data: bytes, seal: Seal | None) -> None:
    """Replace a file that only its owner may read; raises StorageError.

    Args:
        path: the file.
        data: its new content.
        seal: encrypts it; None leaves it as it is.
    """
    write_atomically(path, data if seal is None else seal.close(data), mode=0o600)


def read_sealed(path: Path, seal: Seal | None) -> bytes:
    """What `write_sealed` wrote; raises StorageError where it cannot be read, or is under another passphrase."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the device's state at {path}: {error.strerror}") from None
    if seal is not None:
        return seal.open(data)
    if is_sealed(data):
        raise StorageError(f"the device's state at {path} is encrypted: give its passphrase")
    return data

"""A key that the root delegates something to, in two files: the key, and beside it what the root says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from propolis.link.keys import load_signing_key, save_private_key
from propolis.protos import identity_pb2
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.identity import Signed, SigningKey
from propolis.secure.wire import decode, encode
from propolis.storage import write_atomically

DELEGATION_SUFFIX = ".delegation"
_LARGEST_FILE = 2**14


def make_delegated_key(
    out: Path, delegate: Callable[[bytes], Signed], passphrase: bytes | None
) -> tuple[SigningKey, Signed]:
    """A new key and its delegation; the key is written last, and without it the rest is nothing.

    Args:
        out: file for the key, which does not exist yet.
        delegate: what the root says of a public key, 32 bytes.
        passphrase: encrypts the key.

    Raises:
        StorageError: something could not be written.
    """
    key = Ed25519PrivateKey.generate()
    signing_key = SigningKey(key.private_bytes_raw())
    delegation = delegate(signing_key.public)
    write_atomically(_beside(out), encode(delegation, identity_pb2.Signed))
    save_private_key(out, key, passphrase)
    return signing_key, delegation


def load_delegated_key(
    path: Path, passphrase: bytes | None, claimed: Callable[[Signed], bytes]
) -> tuple[SigningKey, Signed]:
    """The key in a file that `make_delegated_key` wrote, and its delegation, which devices check.

    Args:
        path: the file.
        passphrase: of the key.
        claimed: the public key that a delegation says it is of.

    Raises:
        UsageError: a file cannot be used, or the two do not belong together.
    """
    key = load_signing_key(path, passphrase)
    try:
        delegation = decode(Signed, _beside(path).read_bytes(), identity_pb2.Signed, _LARGEST_FILE)
        public_key = claimed(delegation)
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}, which goes with {path}: {error.strerror}") from None
    except PropolisError as error:
        raise UsageError(f"{_beside(path)} is damaged: {error}") from None
    if public_key != key.public:
        raise UsageError(f"{_beside(path)} is of another key than {path}")
    return key, delegation


def _beside(path: Path) -> Path:
    return path.with_name(path.name + DELEGATION_SUFFIX)

"""Who makes the keys of homomorphic encryption, in two files: the holder's key, and beside it what the root says of it.

The holder is a machine that is never the server: whoever has both opens every upload.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from propolis.link.keys import load_signing_key, save_private_key
from propolis.protos import he_pb2, identity_pb2
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.he.keys import Holder
from propolis.secure.identity import Signed, SigningKey
from propolis.secure.wire import decode, encode
from propolis.server.federation import Federation
from propolis.storage import write_atomically

DELEGATION_SUFFIX = ".delegation"
_LARGEST_FILE = 2**14


@dataclass(frozen=True, slots=True, repr=False)
class HolderKey:
    """See the module."""

    key: SigningKey
    delegation: Signed

    @property
    def claimed(self) -> Holder:
        """What the root is said to say; devices check it."""
        return decode(Holder, self.delegation.payload, he_pb2.Holder)


def make_holder_key(
    federation: Federation, out: Path, lifetime_s: int, now: float, passphrase: bytes | None = None
) -> HolderKey:
    """A new key and its delegation; the key is written last, and without it the rest is nothing.

    Args:
        federation: with its root's key.
        out: file for the key, which does not exist yet, and not in the server's folder.
        lifetime_s: how long the holder's keys are believed, in seconds.
        now: seconds since 1970.
        passphrase: encrypts the key.

    Raises:
        UsageError: the file exists or is in the server's folder, or the root's key cannot be used.
        StorageError: something could not be written.
    """
    require_apart(out, federation.server)
    if out.exists():
        raise UsageError(f"{out} exists: give another --out for another holder")
    key = Ed25519PrivateKey.generate()
    signing_key = SigningKey(key.private_bytes_raw())
    delegation = federation.delegate_key_holder(signing_key.public, lifetime_s, now)
    write_atomically(_beside(out), encode(delegation, identity_pb2.Signed))
    save_private_key(out, key, passphrase)
    return HolderKey(signing_key, delegation)


def load_holder_key(path: Path, passphrase: bytes | None = None) -> HolderKey:
    """The key in a file that `make_holder_key` wrote.

    Raises:
        UsageError: a file cannot be used, or the two do not belong together.
    """
    key = load_signing_key(path, passphrase)
    try:
        found = HolderKey(key, decode(Signed, _beside(path).read_bytes(), identity_pb2.Signed, _LARGEST_FILE))
        public_key = found.claimed.public_key
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}, which goes with {path}: {error.strerror}") from None
    except PropolisError as error:
        raise UsageError(f"{_beside(path)} is damaged: {error}") from None
    if public_key != key.public:
        raise UsageError(f"{_beside(path)} is of another key than {path}")
    return found


def require_apart(secret: Path, server: Path) -> None:
    """Refuse a holder's file in the server's folder; raises UsageError."""
    if secret.resolve().is_relative_to(server.resolve()):
        raise UsageError(
            f"{secret} is in the server's folder: a server that has it opens every upload, keep it elsewhere"
        )


def _beside(path: Path) -> Path:
    return path.with_name(path.name + DELEGATION_SUFFIX)

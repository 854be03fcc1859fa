"""Who makes the keys of homomorphic encryption, in two files: the holder's key, and beside it what the root says of it.

The holder is a machine that is never the server: whoever has both opens every upload.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from propolis.protos import he_pb2
from propolis.secure.errors import UsageError
from propolis.secure.he.keys import Holder
from propolis.secure.identity import Signed, SigningKey
from propolis.secure.wire import decode
from propolis.server.delegated_key import load_delegated_key, make_delegated_key
from propolis.server.federation import Federation


@dataclass(frozen=True, slots=True, repr=False)
class HolderKey:
    """See the module."""

    key: SigningKey
    delegation: Signed

    @property
    def claimed(self) -> Holder:
        """What the root is said to say; devices check it."""
        return _claimed(self.delegation)


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
    return HolderKey(
        *make_delegated_key(out, lambda public: federation.delegate_key_holder(public, lifetime_s, now), passphrase)
    )


def load_holder_key(path: Path, passphrase: bytes | None = None) -> HolderKey:
    """The key in a file that `make_holder_key` wrote.

    Raises:
        UsageError: a file cannot be used, or the two do not belong together.
    """
    return HolderKey(*load_delegated_key(path, passphrase, lambda said: _claimed(said).public_key))


def require_apart(secret: Path, server: Path) -> None:
    """Refuse a holder's file in the server's folder; raises UsageError."""
    if secret.resolve().is_relative_to(server.resolve()):
        raise UsageError(
            f"{secret} is in the server's folder: a server that has it opens every upload, keep it elsewhere"
        )


def _claimed(said: Signed) -> Holder:
    return decode(Holder, said.payload, he_pb2.Holder)

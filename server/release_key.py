"""A key that the root lets release models, in two files: the key, and beside it what the root says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from propolis.protos import model_pb2
from propolis.secure.errors import UsageError
from propolis.secure.identity import Signed, SigningKey
from propolis.secure.release import Delegation
from propolis.secure.wire import decode
from propolis.server.delegated_key import load_delegated_key, make_delegated_key
from propolis.server.federation import Federation


@dataclass(frozen=True, slots=True, repr=False)
class ReleaseKey:
    """See the module."""

    key: SigningKey
    delegation: Signed

    @property
    def claimed(self) -> Delegation:
        """What the root is said to say; devices check it."""
        return _claimed(self.delegation)


def make_release_key(
    federation: Federation,
    out: Path,
    lifetime_s: int,
    now: float,
    models: tuple[str, ...] = (),
    passphrase: bytes | None = None,
) -> ReleaseKey:
    """A new key and its delegation; the key is written last, and without it the rest is nothing.

    Args:
        federation: with its root's key.
        out: file for the key, which does not exist yet.
        lifetime_s: how long it may be used, in seconds.
        now: seconds since 1970.
        models: names that it may release; none of them: all.
        passphrase: encrypts the key.

    Raises:
        UsageError: the file exists, the root's key cannot be used, or a name is none of a model.
        StorageError: something could not be written.
    """
    if out.exists():
        raise UsageError(f"{out} exists: give another --out for another key")
    return ReleaseKey(
        *make_delegated_key(
            out, lambda public: federation.delegate_release_key(public, lifetime_s, now, models), passphrase
        )
    )


def load_release_key(path: Path, passphrase: bytes | None = None) -> ReleaseKey:
    """The key in a file that `make_release_key` wrote.

    Raises:
        UsageError: a file cannot be used, or the two do not belong together.
    """
    return ReleaseKey(*load_delegated_key(path, passphrase, lambda said: _claimed(said).public_key))


def _claimed(said: Signed) -> Delegation:
    return decode(Delegation, said.payload, model_pb2.Delegation)

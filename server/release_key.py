"""A key that the root lets release models, in two files: the key, and beside it what the root says of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from propolis.link.keys import load_signing_key, save_private_key
from propolis.protos import identity_pb2, model_pb2
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.identity import Signed, SigningKey
from propolis.secure.release import Delegation
from propolis.secure.wire import decode, encode
from propolis.server.federation import Federation
from propolis.storage import write_atomically

DELEGATION_SUFFIX = ".delegation"
_LARGEST_FILE = 2**14


@dataclass(frozen=True, slots=True, repr=False)
class ReleaseKey:
    """See the module."""

    key: SigningKey
    delegation: Signed

    @property
    def claimed(self) -> Delegation:
        """What the root is said to say; devices check it."""
        return decode(Delegation, self.delegation.payload, model_pb2.Delegation)


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
    key = Ed25519PrivateKey.generate()
    signing_key = SigningKey(key.private_bytes_raw())
    delegation = federation.delegate_release_key(signing_key.public, lifetime_s, now, models)
    write_atomically(_beside(out), encode(delegation, identity_pb2.Signed))
    save_private_key(out, key, passphrase)
    return ReleaseKey(signing_key, delegation)


def load_release_key(path: Path, passphrase: bytes | None = None) -> ReleaseKey:
    """The key in a file that `make_release_key` wrote.

    Raises:
        UsageError: a file cannot be used, or the two do not belong together.
    """
    key = load_signing_key(path, passphrase)
    try:
        data = _beside(path).read_bytes()
        found = ReleaseKey(key, decode(Signed, data, identity_pb2.Signed, _LARGEST_FILE))
        public_key = found.claimed.public_key
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}, which goes with {path}: {error.strerror}") from None
    except PropolisError as error:
        raise UsageError(f"{_beside(path)} is damaged: {error}") from None
    if public_key != key.public:
        raise UsageError(f"{_beside(path)} is of another key than {path}")
    return found


def _beside(path: Path) -> Path:
    return path.with_name(path.name + DELEGATION_SUFFIX)

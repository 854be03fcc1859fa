"""A device's hybrid key: drawn at random, kept in a file of its own, and announced in the device's own words.

It does not derive from the keys of the device's state: who breaks those one day would have this one too. A device that
enrolled before there were hybrid keys makes one when it is first asked to announce it.

hybrid.key      magic, private key (96 bytes), digest of the public one; under the device's passphrase where it has one
"""

from __future__ import annotations

from pathlib import Path

from propolis.client.seal import Seal, is_sealed
from propolis.client.state import LOCK_FILE, FileStore
from propolis.link.keys import read_private
from propolis.secure.announcement import announce
from propolis.secure.errors import StorageError
from propolis.secure.identity import Signed
from propolis.secure.kem import HYBRID_PRIVATE_BYTES, hybrid_digest, hybrid_key, hybrid_public
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy
from propolis.storage import locked, remove_stale, write_atomically

HYBRID_FILE = "hybrid.key"
_MAGIC = b"propolis hybrid\x01"


def announcement_of(folder: Path, passphrase: bytes | None = None) -> Signed:
    """What a device announces, for `Membership.announce`; its key is made here where there is none yet.

    Args:
        folder: the device's, which has enrolled.
        passphrase: of the device's keys.

    Raises:
        UsageError: there is no ML-KEM on this machine, or others may read the key.
        StorageError: the state or the key cannot be read or kept, as with another passphrase.
    """
    return announcement_under(folder, None if passphrase is None else Seal(passphrase))


def announcement_under(folder: Path, seal: Seal | None) -> Signed:
    """`announcement_of` with what the device's files are under."""
    return announcement_by(FileStore(folder, Policy(), seal).change(lambda device: device.state), folder, seal)


def announcement_by(state: DeviceState, folder: Path, seal: Seal | None) -> Signed:
    """`announcement_of` for a state that has been read."""
    public = hybrid_public(_own_key(folder, seal))
    return announce(state.signing_key, state.own_descriptor.federation, state.descriptor, public)


def load_hybrid_key(folder: Path, seal: Seal | None) -> bytes | None:
    """The private hybrid key of a device, 96 bytes; None where it has none.

    Raises:
        UsageError: others may read the file, or there is no ML-KEM on this machine.
        StorageError: it is damaged, or under another passphrase.
    """
    path = folder / HYBRID_FILE
    if not path.exists():
        return None
    data = read_private(path)
    if seal is not None:
        data = seal.open(data)
    elif is_sealed(data):
        raise StorageError(f"{path} is encrypted: give its passphrase")
    private = data[len(_MAGIC) :][:HYBRID_PRIVATE_BYTES]
    if len(private) != HYBRID_PRIVATE_BYTES or data != _content(private):
        raise StorageError(f"{path} is damaged: it holds no hybrid key")
    return private


def _own_key(folder: Path, seal: Seal | None) -> bytes:
    """The key in the folder, or a new one; of two processes that make one, the first one does."""
    path = folder / HYBRID_FILE
    with locked(folder / LOCK_FILE):
        found = load_hybrid_key(folder, seal)
        if found is not None:
            return found
        private, _ = hybrid_key()
        content = _content(private)
        remove_stale(path)
        write_atomically(path, content if seal is None else seal.close(content), mode=0o600)
        return private


def _content(private: bytes) -> bytes:
    """A file; the digest tells a damaged key from another one."""
    return _MAGIC + private + hybrid_digest(hybrid_public(private))

"""A device's part of a key of homomorphic encryption: opened from files, checked, and kept in the device's folder.

It is checked again whenever it is loaded, against the newest roster that the device has seen: a holder may have been
revoked meanwhile, or its time be over.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from propolis.client.he_folder import HE_KEY_FILE, read_he_keys, write_he_keys
from propolis.client.keyholder import Keyholder
from propolis.client.seal import Seal, is_sealed
from propolis.client.state import LOCK_FILE
from propolis.records import open_file, read_bytes
from propolis.secure.errors import PeerError, PropolisError, Refusal, StorageError, TrustError, UsageError
from propolis.secure.he.held import LARGEST_BUNDLE, KeyBundle
from propolis.secure.he.keys import PublicKey, Secret, open_key
from propolis.secure.he.published import Published, accept_key
from propolis.storage import locked


@dataclass(frozen=True, slots=True, repr=False)
class OpenedKey:
    """A key that a device may use.

    Attributes:
        public: its public part.
        secret: its secret part.
        number: higher than that of any key before.
    """

    public: PublicKey
    secret: Secret
    number: int


def open_for(device: Keyholder, published: Published, sealed: bytes, now: float) -> OpenedKey:
    """Believe a key, and open this device's part of it.

    Args:
        device: as it is now, with the newest roster that it has seen.
        published: the key's public part.
        sealed: the device's part, from `propolis.he_files.read_sealed_key`.
        now: seconds since 1970.

    Raises:
        TrustError: nobody whom the root lets make keys has made it, it is another key, or another device's part.
        PeerError: something is malformed.
    """
    accepted = accept_key(published, device.trust, now)
    secret = open_key(sealed, accepted.key, device.descriptor, device.hpke_private)
    return OpenedKey(accepted.key, secret, accepted.number)


def install_he_key(
    folder: Path, device: Keyholder, published: Published, sealed: bytes, now: float, seal: Seal | None = None
) -> OpenedKey:
    """Keep a key in the device's folder, before an older one; the same one again changes nothing.

    A key whose number is lower than that of the last one is refused, for a device that has been revoked since may have
    it; what a holder said that is revoked now does not count.

    Args:
        folder: the device's.
        device: see `open_for`.
        published: see `open_for`.
        sealed: see `open_for`.
        now: see `open_for`.
        seal: encrypts the file; None leaves it sealed to the key in the device's state.

    Raises:
        TrustError: as `open_for`, or the device has a newer key, or another one of this number.
        PeerError: something is malformed.
        StorageError: it could not be kept, or what is kept cannot be read.
    """
    opened = open_for(device, published, sealed, now)
    path = folder / HE_KEY_FILE
    with locked(folder / LOCK_FILE):
        before = _read(path, seal)
        if before is not None and before.serial not in device.trust.roster.roster.revoked_releases:
            _require_newer(opened, published, before)
        content = KeyBundle(published.holder, published.statement, published.material, sealed).to_bytes()
        former = [data for data in read_he_keys(folder, seal) if not _is_of(data, published)]
        write_he_keys(folder, seal, content, former)
    return opened


def load_he_key(folder: Path, device: Keyholder, now: float, seal: Seal | None = None) -> OpenedKey | None:
    """The key that a device has, checked as if it had just come; None where it has none.

    Args:
        folder: the device's.
        device: see `open_for`.
        now: seconds since 1970.
        seal: of the device's passphrase.

    Raises:
        TrustError: the root no longer lets its holder make keys, or it is not this device's.
        StorageError: the file cannot be read, is damaged, or under another passphrase.
    """
    kept = _read(folder / HE_KEY_FILE, seal)
    return None if kept is None else open_for(device, kept.published, kept.sealed, now)


def _is_of(data: bytes, published: Published) -> bool:
    """Whether a bundle that is kept is of this key; one that cannot be read is left for who needs it to say so."""
    with suppress(PeerError):
        return KeyBundle.from_bytes(data).material == published.material
    return False


def _require_newer(opened: OpenedKey, published: Published, before: KeyBundle) -> None:
    if opened.number < before.number:
        raise TrustError(
            Refusal.HE_KEY, f"this is key {opened.number}, and the device has {before.number}: an older one is refused"
        )
    if opened.number == before.number and published.material != before.material:
        raise TrustError(Refusal.HE_KEY, f"the device has another key with this number, {before.number}")


def _read(path: Path, seal: Seal | None) -> KeyBundle | None:
    if not path.exists():
        return None
    try:
        with open_file(path, follow=False) as file:
            data = read_bytes(file, LARGEST_BUNDLE)
    except UsageError as error:
        raise StorageError(str(error)) from None
    if seal is not None:
        data = seal.open(data)
    elif is_sealed(data):
        raise StorageError(f"{path} is encrypted: give its passphrase")
    try:
        kept = KeyBundle.from_bytes(data)
        _ = kept.number, kept.serial
        return kept
    except PropolisError:
        raise StorageError(f"{path} is damaged: remove it, and install the key again") from None

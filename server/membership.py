"""The server's live view of who belongs to the federation: the newest roster, and who has enrolled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from propolis.link.certificates import DeviceName
from propolis.protos import identity_pb2 as pb
from propolis.secure.announcement import verify_announcement
from propolis.secure.errors import PropolisError, Refusal, TrustError, UsageError
from propolis.secure.identity import Signed, TrustedRoster, descriptor_digest
from propolis.secure.wire import decode, encode
from propolis.server.roster import ROSTER_FILE, load_root, load_roster_of
from propolis.storage import locked, remove_stale, stamp_of, write_atomically

ENROLLED_FOLDER = "enrolled"
_ANNOUNCED_SUFFIX = ".hybrid"
_LARGEST_DESCRIPTOR = 4096
# Another server on the same folder holds it for one write; this one's devices wait meanwhile.
_LOCK_FILE, _LOCK_S = ".lock", 5.0
_log = logging.getLogger("propolis.server")


class Membership:
    """See the module.

    Args:
        folder: the server's, with `root.pub` and `roster.bin`; who has enrolled is kept in `enrolled/`.
        clock: seconds since 1970.

    Attributes:
        root_key: the federation's root, 32 bytes: the same for as long as the process lives.
        roster: the newest that was found.

    Raises:
        UsageError: the folder holds no federation.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self.root_key = load_root(folder)
        self._seen = stamp_of(folder / ROSTER_FILE)
        self.roster: TrustedRoster = load_roster_of(self.root_key, folder)
        self._reported = self.roster.number
        self._complaint: str | None = None
        self._enrolled: dict[int, Signed] = {}
        (folder / ENROLLED_FOLDER).mkdir(mode=0o700, exist_ok=True)

    def refresh(self) -> bool:
        """Take a newer roster where one was put into the folder; call it often, it costs a look at the file.

        Returns:
            Whether there is a newer one than at the last call. One that is damaged, older, or not this root's is logged
            and ignored.
        """
        self.look()
        before, self._reported = self._reported, self.roster.number
        return before != self._reported

    def look(self) -> None:
        """`refresh` without a report, for who needs the newest roster in between: others still hear of it."""
        stamp = stamp_of(self._folder / ROSTER_FILE)
        if stamp == self._seen:
            return
        try:
            found = load_roster_of(self.root_key, self._folder)
        except UsageError as error:  # half of it is copied, or no more files can be opened: look again
            self._complain(str(error))
            return
        self._seen, self._complaint = stamp, None
        if found.number > self.roster.number:
            _log.info("roster %d takes the place of %d", found.number, self.roster.number)
            self.roster = found
        elif found.signed != self.roster.signed:
            _log.warning("keeping roster %d: the one in the folder is %d", self.roster.number, found.number)

    def _complain(self, fault: str) -> None:
        """Once, however often it is found."""
        if fault != self._complaint:
            _log.warning("keeping roster %d: %s", self.roster.number, fault)
            self._complaint = fault

    def require(self, name: DeviceName) -> None:
        """Let in a device that enrolled here and may still take part.

        Raises:
            TrustError: another federation's, not in the roster, revoked, not enrolled, enrolled with other keys, or
                the roster has expired.
            UsageError: its descriptor cannot be read, for now.
        """
        if name.federation != self.roster.roster.federation:
            raise TrustError(Refusal.IDENTITY, f"device {name.index} is of another federation")
        self.roster.require_current(self._clock())
        self.roster.require_member(name.index)
        descriptor = self.enrolled(name.index)
        if descriptor is None:
            raise TrustError(Refusal.IDENTITY, f"device {name.index} has not enrolled with this server")
        if descriptor_digest(descriptor) != name.descriptor:
            raise TrustError(Refusal.IDENTITY, f"device {name.index} enrolled with other keys than these")

    def enrolled(self, index: int) -> Signed | None:
        """The descriptor that a device enrolled with, if it has."""
        if index not in self._enrolled:
            descriptor = read_enrolled(self._folder, index)
            if descriptor is None:
                return None
            self._enrolled[index] = descriptor
        return self._enrolled[index]

    def admit(self, index: int, descriptor: Signed) -> None:
        """Keep, for good, what a device enrolled with; the same one again changes nothing.

        Raises:
            TrustError: another descriptor has this place.
            StorageError: it could not be kept.
        """
        with locked(self._folder / ENROLLED_FOLDER / _LOCK_FILE, _LOCK_S):
            before = self.enrolled(index)
            if before is None:
                remove_stale(_path(self._folder, index))
                write_atomically(_path(self._folder, index), encode(descriptor, pb.Signed), mode=0o600)
                self._enrolled[index] = descriptor
                _log.info("device %d has enrolled", index)
        if before is not None and before.payload != descriptor.payload:
            raise TrustError(
                Refusal.IDENTITY,
                f"the token was used before, by another device: place {index} is taken. If that was not you, revoke it",
            )

    def announce(self, index: int, signed: Signed) -> None:
        """Keep, for good, the hybrid key that a device has announced; the same one again changes nothing.

        A device has one for life. Were another one taken later, who has a device's signing key could have what is
        released from then on sealed to a key of his own.

        Raises:
            TrustError: it is not a member's, not signed by the device that enrolled, or another one than was kept.
            PeerError: it is malformed.
            UsageError: what was kept cannot be read, or there is no ML-KEM on this machine.
            StorageError: it could not be kept.
        """
        self.roster.require_member(index)
        descriptor = self.enrolled(index)
        if descriptor is None:
            raise TrustError(Refusal.IDENTITY, f"device {index} has not enrolled with this server")
        verify_announcement(self.roster.descriptor(descriptor), descriptor_digest(descriptor), signed)
        path = _announced_path(self._folder, index)
        with locked(self._folder / ENROLLED_FOLDER / _LOCK_FILE, _LOCK_S):
            before = self.announced(index)
            if before is None:
                remove_stale(path)
                write_atomically(path, encode(signed, pb.Signed), mode=0o600)
                _log.info("device %d has announced a hybrid key", index)
        if before is not None and before.payload != signed.payload:
            raise TrustError(
                Refusal.KEYS,
                f"device {index} has announced another hybrid key before, and may have one: enrol it anew",
            )

    def announced(self, index: int) -> Signed | None:
        """What a device has announced, if it has, for `verify_announcement`; raises UsageError when it is damaged."""
        return _read_signed(_announced_path(self._folder, index))


def read_enrolled(folder: Path, index: int) -> Signed | None:
    """The descriptor that a device enrolled with, if it has; raises UsageError when the file is damaged."""
    return _read_signed(_path(folder, index))


def _read_signed(path: Path) -> Signed | None:
    try:
        return decode(Signed, path.read_bytes(), pb.Signed, _LARGEST_DESCRIPTOR)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except PropolisError as error:
        raise UsageError(f"{path} is damaged: {error}") from None


def _path(folder: Path, index: int) -> Path:
    return folder / ENROLLED_FOLDER / str(index)


def _announced_path(folder: Path, index: int) -> Path:
    return folder / ENROLLED_FOLDER / f"{index}{_ANNOUNCED_SUFFIX}"

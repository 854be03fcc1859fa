"""Where a device keeps the packages of one model: two slots, and a record of which of them is current.

models/NAME/installed       the record, replaced atomically: the only thing that says what is installed
models/NAME/slots/a, b      a package, the key to it, of an encrypted model also what the device has exported, under a
                            key of its own, and, only if its owner asked for them, the plain files

A slot is made aside and moved into place as a whole, and never where the current one is. So at every instant the record
names a slot that is whole.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from propolis.link.delivery import Release
from propolis.package import Package, read_key, write_key
from propolis.protos import model_pb2 as pb
from propolis.records import open_file
from propolis.secure.content import WrappedKey
from propolis.secure.errors import RefusedError, StorageError, UsageError
from propolis.secure.identity import DIGEST_BYTES
from propolis.secure.manifest import Accepted
from propolis.secure.release import LARGEST_NUMBER, is_model_name
from propolis.secure.wire import between, decode, encode, many, sized, version_field
from propolis.storage import locked, sync_folder, write_atomically

MODELS_FOLDER, RECORD_FILE = "models", "installed"
SLOT_NAMES = ("a", "b")
_LOCK_FILE, _SLOTS_FOLDER = "lock", "slots"
_PACKAGE_FILE, _KEY_FILE, _EXPORT_FILE, _PLAIN_FOLDER = "package", "key", "export", "plain"
_NEW = ".new-"
_LARGEST_RECORD = 4096
# Another process may be trying a model meanwhile.
_LONGEST_WAIT_S = 300.0
_log = logging.getLogger("propolis.client")


@dataclass(frozen=True, slots=True)
class Trusted:
    """A release that a device has trusted: its number, the digest of its manifest, the serial of its release key."""

    sequence: int = between(1, LARGEST_NUMBER)
    manifest: bytes = sized(DIGEST_BYTES)
    serial: int = between(1, LARGEST_NUMBER)

    @classmethod
    def of(cls, accepted: Accepted) -> Trusted:
        """What is kept of a release."""
        return cls(accepted.manifest.sequence, accepted.digest, accepted.serial)


@dataclass(frozen=True, slots=True)
class Slot:
    """What is in a slot: 0 is a, 1 is b."""

    release: Trusted
    slot: int = between(0, len(SLOT_NAMES) - 1)
    model_version: int = between(0, LARGEST_NUMBER)

    @property
    def letter(self) -> str:
        """What its folder is called."""
        return SLOT_NAMES[self.slot]


@dataclass(frozen=True, slots=True)
class Record:
    """What is installed of one model.

    Attributes:
        newest: of the releases that were trusted, installed or not.
        slots: the current one first, then the one to fall back to.
    """

    newest: Trusted
    slots: tuple[Slot, ...] = many(len(SLOT_NAMES))
    version: int = version_field()

    @property
    def current(self) -> Slot | None:
        """The slot that is in use."""
        return self.slots[0] if self.slots else None

    def newest_of(self, revoked: Collection[int]) -> Trusted | None:
        """What a release must be newer than.

        What a revoked key signed does not count: whoever had it could have used up all the numbers.
        """
        known = (self.newest, *(slot.release for slot in self.slots))
        held = [trusted for trusted in known if trusted.serial not in revoked]
        return max(held, key=lambda trusted: trusted.sequence, default=None)


class Slots:
    """The slots of one model on a device.

    Args:
        device: the device's folder.
        name: of the model.

    Raises:
        UsageError: something there is a symbolic link.
        StorageError: the folders could not be made.
    """

    def __init__(self, device: Path, name: str) -> None:
        self._home = device / MODELS_FOLDER / name
        self._slots = self._home / _SLOTS_FOLDER
        for folder in (device / MODELS_FOLDER, self._home, self._slots):
            _make_folder(folder)
        for letter in SLOT_NAMES:
            _require_no_link(self._slots / letter)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away; what a crash left behind is removed."""
        with locked(self._home / _LOCK_FILE, _LONGEST_WAIT_S):
            for left in self._slots.glob(f"{_NEW}*"):
                shutil.rmtree(left, ignore_errors=True)
            for left in self._home.glob(f".{RECORD_FILE}.*"):
                left.unlink(missing_ok=True)
            yield

    def record(self) -> Record | None:
        """What is installed; None before the first. Raises as `read_record` does."""
        return read_record(self._home)

    def write_record(self, record: Record) -> None:
        """Say what is installed from now on; raises StorageError."""
        write_atomically(self._home / RECORD_FILE, encode(record, pb.Installed), mode=0o600)

    def trust(self, record: Record | None, newest: Trusted) -> Record:
        """Note that a release is trusted, before it is installed; nothing older is taken from then on."""
        following = Record(newest, ()) if record is None else replace(record, newest=newest)
        if following != record:
            self.write_record(following)
        return following

    def fill(
        self, record: Record, package: Package, key: WrappedKey, accepted: Accepted, export: bytes | None = None
    ) -> Record:
        """Put a package into the slot that is not current, and make it the current one.

        Args:
            record: what is installed.
            package: the package.
            key: to it.
            accepted: what it says.
            export: what the device has exported of it, as it keeps that; None where it serves the files as they came.

        Raises:
            StorageError: it could not be written; what was current is whole, and stays current.
            TrustError: the package is not what it was when it was checked.
        """
        before = record.slots[:1]
        free = 1 - before[0].slot if before else 0
        filled = Slot(Trusted.of(accepted), free, accepted.manifest.model_version)
        with self._new_folder(self._slots / filled.letter) as folder:
            write_atomically(folder / _PACKAGE_FILE, package.parts(), mode=0o600)
            write_key(folder / _KEY_FILE, key)
            if export is not None:
                write_atomically(folder / _EXPORT_FILE, export, mode=0o600)
        following = replace(record, slots=(filled, *before))
        self.write_record(following)
        return following

    def keep_plain(self, slot: Slot, files: Mapping[str, bytes]) -> None:
        """Write the plain files too; raises StorageError."""
        with self._new_folder(self._slots / slot.letter / _PLAIN_FOLDER) as folder:
            for name, content in files.items():
                write_atomically(folder / name, content, mode=0o600)

    @contextmanager
    def open(self, slot: Slot, index: int) -> Iterator[tuple[Package, WrappedKey]]:
        """What is in a slot, for the device of this index; raises UsageError or PeerError when it cannot be read."""
        folder = self._slots / slot.letter
        with Package.open(folder / _PACKAGE_FILE, follow=False) as package:
            yield package, read_key(folder / _KEY_FILE, index, follow=False)

    def export_of(self, slot: Slot) -> bytes:
        """What the device has exported of the package in a slot; raises UsageError when it cannot be read."""
        with open_file(self._slots / slot.letter / _EXPORT_FILE, follow=False) as file:
            return file.read()

    @contextmanager
    def _new_folder(self, place: Path) -> Iterator[Path]:
        """A folder that takes its place when all is in it and on the disk."""
        try:
            folder = Path(tempfile.mkdtemp(prefix=_NEW, dir=self._slots))
            try:
                yield folder
                if place.exists():
                    shutil.rmtree(place)
                folder.rename(place)
                sync_folder(place.parent)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise StorageError(f"cannot write {place}: {error.strerror}") from None


def read_record(home: Path) -> Record | None:
    """What is installed in the folder of a model; None where nothing is.

    Raises:
        StorageError: the record is damaged, or cannot be read.
    """
    path = home / RECORD_FILE
    try:
        return decode(Record, path.read_bytes(), pb.Installed, _LARGEST_RECORD)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None
    except RefusedError:
        raise StorageError(f"{path} is damaged: remove it, and install the newest package again") from None


def record_of(device: Path, name: str) -> Record | None:
    """What is installed of a model on a device; None where nothing is. Raises as `read_record` does."""
    record = read_record(device / MODELS_FOLDER / name) if is_model_name(name) else None
    return record if record is not None and record.slots else None


def model_names(device: Path) -> list[str]:
    """The models that a device has a record of, damaged or not."""
    return sorted(path.parent.name for path in (device / MODELS_FOLDER).glob(f"*/{RECORD_FILE}"))


def records(device: Path) -> dict[str, Record]:
    """What is installed on a device, by the model's name; raises as `read_record` does."""
    return {name: record for name in model_names(device) if (record := record_of(device, name)) is not None}


def installed_releases(device: Path) -> list[Release]:
    """The current release of every model; a record that is damaged is logged, and its model counts as not there."""
    found = []
    for name in model_names(device):
        try:
            record = record_of(device, name)
        except StorageError as error:
            _log.warning("%s", error)
            continue
        if record is not None and record.current is not None:
            found.append(Release(name, record.current.release.sequence, record.current.release.manifest))
    return found


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {path}: {error.strerror}") from None
    _require_no_link(path)


def _require_no_link(path: Path) -> None:
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link, which could lead anywhere: remove it")

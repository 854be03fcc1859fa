"""A package is installed: checked, opened in memory, tried, and only then put in the place of the one before.

Plain weights never touch the disk, unless the device's owner says so: a slot has the package as it came and the key as
it was sealed to this device, and what is installed is checked again whenever it is opened. That takes no network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from propolis.client.kept_export import open_export, seal_export
from propolis.client.keyholder import Keyholder
from propolis.client.opening import as_exported, encrypted_file, golden_file
from propolis.client.probe import Probe, try_model
from propolis.client.slots import Record, Slot, Slots, Trusted, record_of, records
from propolis.link.delivery import Outcome, Release
from propolis.package import Header, Package
from propolis.secure.content import WrappedKey, open_files, require_chunk_digests, unwrap_key
from propolis.secure.errors import PeerError, PropolisError, Refusal, RefusedError, StorageError, TrustError, UsageError
from propolis.secure.manifest import Accepted, Expected, Manifest, accept, accept_again

LARGEST_MODEL = 2**30
# Makes the device's own files of a release whose model is encrypted: of its manifest, the model, the golden batch.
Exporter = Callable[[Manifest, bytes, bytes], Mapping[str, bytes]]
_log = logging.getLogger("propolis.client")


@dataclass(frozen=True, slots=True)
class Status:
    """What a device says of a package: a step that is done, or why it failed, as a `Refusal` is called in words."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Opened:
    """An installed model, in memory.

    Attributes:
        manifest: what was released; of a model that was released encrypted, with the device's own files in it.
        files: by name.
        fell_back: this is the one before, for the current one does not open or does not run.
    """

    manifest: Manifest
    files: Mapping[str, bytes]
    fell_back: bool = False


class Installer:
    """The models of one device.

    Args:
        folder: the device's.
        device: that opens them.
        probe: tries a model before it is trusted; None where nothing on this device can run it.
        largest: bytes of a model's plain files that this device takes at most.
        tell: hears of every step of an installation.
        exporter: opens what was released encrypted; None refuses it, for the device does not know the task. What is
            installed opens without.
    """

    def __init__(
        self,
        folder: Path,
        device: Keyholder,
        probe: Probe | None = None,
        *,
        largest: int = LARGEST_MODEL,
        tell: Callable[[Status], None] = lambda _: None,
        exporter: Exporter | None = None,
    ) -> None:
        self._folder, self._device, self._probe, self._exporter = folder, device, probe, exporter
        self._largest, self._tell = largest, tell

    def require_acceptable(self, header: Header, now: float, release: Release) -> None:
        """Look at what a package begins with, before the rest is fetched; `install` looks at all of it again.

        Args:
            header: of the package.
            now: seconds since 1970.
            release: that was offered.

        Raises:
            PeerError, TrustError: the package would be refused, or is another release than was offered.
        """
        try:
            expected = self._newer(Expected(now, self._largest, release.name), record_of(self._folder, release.name))
            accepted = accept(header.release, self._device.trust, expected)
            if (accepted.manifest.sequence, accepted.digest) != (release.sequence, release.manifest):
                raise TrustError(Refusal.PACKAGE, f"the package is another one than {release}, which was offered")
            require_chunk_digests(accepted.manifest, header.chunk_digests)
            if encrypted_file(accepted.manifest) is not None:
                self._exporter_of(accepted.manifest)
        except RefusedError as error:
            if error.refusal is not Refusal.ROLLED_BACK:  # what is installed is newer: that is no failure
                self._tell(Status(Outcome.FAILED, error.refusal.reason))
            raise

    def install(
        self, path: Path, key: WrappedKey, now: float, *, name: str | None = None, store_plain: bool = False
    ) -> Manifest:
        """Install the package in a file; where it is installed already, nothing changes.

        Args:
            path: the file.
            key: to the package, for this device.
            now: seconds since 1970.
            name: of the model that is expected; None takes any, each has slots of its own.
            store_plain: leave the plain files in the slot, for other programs.

        Returns:
            What is installed now.

        Raises:
            PeerError, TrustError: the package is refused.
            UsageError, StorageError: it could not be read or kept.
        """
        expected = Expected(now, self._largest, name)
        try:
            with Package.open(path) as package:
                self._tell(Status(Outcome.FETCHED))
                accepted = accept(package.release, self._device.trust, expected)
                slots = Slots(self._folder, accepted.manifest.name)
                with slots.locked():
                    record = self._trust(package, slots, expected)
                    files: Mapping[str, bytes] = self._open(package, key, accepted)
                    self._tell(Status(Outcome.VERIFIED))
                    manifest, files, export = self._exported(accepted, files, slots, record)
                    self._try(manifest, files)
                    slot = self._keep(package, key, slots, record, accepted, export)
                    if store_plain:
                        slots.keep_plain(slot, files)
        except Exception as error:  # whoever waits for a word gets one, whatever it was
            self._tell(Status(Outcome.FAILED, _reason_of(error)))
            raise
        self._tell(Status(Outcome.INSTALLED))
        return accepted.manifest

    def open(self, name: str | None = None) -> Opened:
        """The model that is installed, checked and tried again.

        Where the current one does not hold, it is the one before, from then on; where the current one cannot be read or
        does not pass its trial, which may be otherwise the next time, it is the one before this time.

        Args:
            name: of the model; None where there is only one.

        Raises:
            UsageError: there is no such model, or none of its slots opens.
        """
        name = name or self._only_model()
        found = record_of(self._folder, name)
        if found is None:
            raise UsageError(f"{name} is not installed in {self._folder}")
        slots, faults, passes = Slots(self._folder, name), list[str](), False
        with slots.locked():
            record = slots.record() or found
            for place, slot in enumerate(record.slots):
                try:
                    manifest, files = self._read(slots, slot)
                    self._try(manifest, files)
                except PropolisError as error:
                    _log.warning("slot %s of %s: %s", slot.letter, name, error)
                    faults.append(f"{slot.letter}: {error}")
                    passes = passes or _may_pass(error)
                    continue
                if place > 0 and not passes:
                    self._fall_back(slots, record)
                return Opened(manifest, files, fell_back=place > 0)
        raise UsageError(f"no slot of {name} can be used, install it again: {'; '.join(faults)}")

    def _only_model(self) -> str:
        names = list(records(self._folder))
        if not names:
            raise UsageError(f"no model is installed in {self._folder}")
        if len(names) > 1:
            raise UsageError(f"there is more than one model in {self._folder}, name one: {', '.join(names)}")
        return names[0]

    def _trust(self, package: Package, slots: Slots, expected: Expected) -> Record:
        """Check once more, now against what was trusted before, and note it: nothing older is taken from here on."""
        record = slots.record()
        expected = self._newer(expected, record)
        return slots.trust(record, Trusted.of(accept(package.release, self._device.trust, expected)))

    def _newer(self, expected: Expected, record: Record | None) -> Expected:
        """What a release must be newer than, too: what was trusted before."""
        revoked = self._device.trust.roster.roster.revoked_releases
        newest = None if record is None else record.newest_of(revoked)
        if newest is None:
            return expected
        return replace(expected, sequence=newest.sequence, manifest=newest.manifest)

    def _open(self, package: Package, key: WrappedKey, accepted: Accepted) -> dict[str, bytes]:
        package.require_whole(accepted.manifest)
        private = self._device.private_for(accepted.manifest.kem)
        content_key = unwrap_key(key, accepted, self._device.descriptor, private)
        return open_files(accepted.manifest, content_key, package.chunks())

    def _exporter_of(self, manifest: Manifest) -> Exporter:
        if self._exporter is None:
            raise PeerError(Refusal.EXPORT, f"{manifest.name} is encrypted, and this device was not told its task")
        return self._exporter

    def _exported(
        self, accepted: Accepted, files: Mapping[str, bytes], slots: Slots, record: Record
    ) -> tuple[Manifest, Mapping[str, bytes], bytes | None]:
        """A release as it is served here, and what is kept of it where its model came encrypted."""
        manifest, current = accepted.manifest, record.current
        name = encrypted_file(manifest)
        if name is None:
            return manifest, files, None
        if current is not None and current.release == Trusted.of(accepted):
            with suppress(PropolisError):  # else it is made anew
                return *self._read(slots, current), slots.export_of(current)
        own = self._exporter_of(manifest)(manifest, files[name], golden_file(manifest, files))
        return *as_exported(manifest, files, own), seal_export(self._device, accepted.digest, own)

    def _try(self, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        if self._probe is not None:
            try_model(self._probe, manifest, files)
            self._tell(Status(Outcome.PROBE_PASSED))

    def _keep(
        self,
        package: Package,
        key: WrappedKey,
        slots: Slots,
        record: Record,
        accepted: Accepted,
        export: bytes | None,
    ) -> Slot:
        """The slot with the package: the current one where it is there and whole, else the other one."""
        current = record.current
        if current is not None and current.release == Trusted.of(accepted):
            try:
                self._read(slots, current)
            except PropolisError:
                record = replace(record, slots=record.slots[1:])
            else:
                return current
        try:
            return slots.fill(record, package, key, accepted, export).slots[0]
        except StorageError as error:
            kept = slots.record() or record
            if kept.current is None:
                raise
            stays = f"release {kept.current.release.sequence} of {accepted.manifest.name} is what is installed"
            raise StorageError(f"{error}; {stays}") from None

    def _read(self, slots: Slots, slot: Slot) -> tuple[Manifest, dict[str, bytes]]:
        with slots.open(slot, self._device.index) as (package, key):
            accepted = accept_again(package.release, self._device.trust)
            if Trusted.of(accepted) != slot.release:
                raise TrustError(Refusal.PACKAGE, "it holds another package than was installed")
            manifest, files = accepted.manifest, self._open(package, key, accepted)
            if encrypted_file(manifest) is None:
                return manifest, files
            return as_exported(manifest, files, open_export(self._device, accepted.digest, slots.export_of(slot)))

    def _fall_back(self, slots: Slots, record: Record) -> None:
        """Forget the slot that cannot be used; where that cannot be written, it is found out again the next time."""
        try:
            slots.write_record(replace(record, slots=record.slots[1:]))
        except StorageError as error:
            _log.warning("%s", error)


def _may_pass(error: PropolisError) -> bool:
    """Whether it may be otherwise the next time: a file that could not be opened, a trial on a busy processor."""
    return not isinstance(error, RefusedError) or error.refusal is Refusal.PROBE


def _reason_of(error: Exception) -> str:
    """A word for the report."""
    if isinstance(error, RefusedError):
        return error.refusal.reason
    return "memory" if isinstance(error, MemoryError) else Refusal.STORAGE.reason

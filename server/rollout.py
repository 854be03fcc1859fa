"""Releases on their way to the devices: which are on offer, to how many, and whether that goes on.

published/index.json                     what is on offer; replaced atomically, and the only thing that says so
published/NAME/SEQUENCE/package[.keys]   a package, and the keys of the devices that it was sealed for

A device is offered the newest release of a model whose rollout runs and has reached it. Whether it has, follows from a
hash of the device and the release: a higher percentage takes more devices in, and never one out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from propolis.link.delivery import MOST_OFFERS, Release
from propolis.package import manifest_of_keys, verify_package
from propolis.secure import labels
from propolis.secure.errors import RefusedError, StorageError, UsageError
from propolis.secure.manifest import LARGEST_PLAINTEXT, Accepted, Expected, Trust
from propolis.secure.release import LARGEST_NUMBER
from propolis.server.publish import KEYS_SUFFIX
from propolis.server.roster import load_root, load_roster_of
from propolis.storage import locked, remove_stale, write_atomically

PUBLISHED_FOLDER, INDEX_FILE, PACKAGE_FILE = "published", "index.json", "package"
_LOCK_FILE = ".lock"
_COPIED_BYTES = 2**20


class Progress(StrEnum):
    """Whether a rollout goes on."""

    RUNNING = "running"
    PAUSED = "paused"  # nobody new begins; who has begun goes on
    STOPPED = "stopped"  # for good: who has begun is cut off, and the release before is on offer again


class Rollout(BaseModel):
    """A release that was handed over for delivery.

    Attributes:
        name, sequence: of the release.
        manifest: its digest, in hexadecimal.
        percent: of the devices that it is for.
        progress: whether it goes on.
        started: seconds since 1970.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    sequence: int = Field(ge=1, le=LARGEST_NUMBER)
    manifest: str = Field(pattern="^[0-9a-f]{64}$")
    percent: float = Field(ge=0, le=100)
    progress: Progress = Progress.RUNNING
    started: float

    @property
    def release(self) -> Release:
        """The release, as it is called on the wire."""
        return Release(self.name, self.sequence, bytes.fromhex(self.manifest))

    def reaches(self, descriptor: bytes) -> bool:
        """Whether the percentage takes in the device whose descriptor has this digest."""
        drawn = labels.digest(labels.ROLLOUT, bytes.fromhex(self.manifest), descriptor)
        return int.from_bytes(drawn[:8], "big") < self.percent / 100 * 2**64


class _Index(BaseModel):
    """The file that says what is on offer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    rollouts: tuple[Rollout, ...] = ()


class Rollouts:
    """The rollouts in a server's folder.

    Args:
        folder: the server's, with the federation's roster.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.home = folder, folder / PUBLISHED_FOLDER

    @property
    def index(self) -> Path:
        """The file that changes whenever a rollout does."""
        return self.home / INDEX_FILE

    def all(self) -> tuple[Rollout, ...]:
        """By name, the newest of each first; raises UsageError when the index is damaged or cannot be read."""
        try:
            found = _Index.model_validate_json(self.index.read_bytes()).rollouts
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise UsageError(f"cannot read {self.index}: {error.strerror}") from None
        except ValidationError:
            raise UsageError(f"{self.index} is damaged") from None
        return tuple(sorted(found, key=lambda each: (each.name, -each.sequence)))

    def all_of(self, name: str) -> tuple[Rollout, ...]:
        """The rollouts of a model, the newest first; raises UsageError when there are none."""
        every = self.all()
        if found := tuple(each for each in every if each.name == name):
            return found
        known = ", ".join(sorted({each.name for each in every})) or "none"
        raise UsageError(f"no release of {name} has been handed over for delivery; there are releases of: {known}")

    def package(self, rollout: Rollout) -> Path:
        """Its package; the keys are beside it."""
        return self.home / rollout.name / str(rollout.sequence) / PACKAGE_FILE

    def start(self, package: Path, percent: float, now: float | None = None) -> Rollout:
        """Hand a package over for delivery; the same one again changes nothing but the percentage.

        Args:
            package: as it was sealed, with its keys beside it.
            percent: of the devices.
            now: seconds since 1970.

        Raises:
            UsageError: it is no package, devices would refuse it, or it is not newer than what was handed over before.
            StorageError: it could not be copied.
        """
        now = time.time() if now is None else now
        accepted = self._acceptable(package, now)
        started = Rollout(
            name=accepted.manifest.name,
            sequence=accepted.manifest.sequence,
            manifest=accepted.digest.hex(),
            percent=_percent(percent),
            started=now,
        )
        with self._changing() as before:
            newest = next((each for each in before if each.name == started.name), None)
            if newest is None or newest.manifest != started.manifest:
                if newest is not None and newest.sequence >= started.sequence:
                    raise UsageError(
                        f"{started.release} is not newer than {newest.sequence}: seal it with a higher number"
                    )
                if newest is None and len({each.name for each in before}) >= MOST_OFFERS:
                    raise UsageError(f"there are releases of {MOST_OFFERS} models: devices are offered no more")
                self._place(package, self.package(started))
                self._write((started, *before))
                return started
        return self.change(started.name, percent, sequence=started.sequence)

    def change(
        self,
        name: str,
        percent: float | None = None,
        progress: Progress | None = None,
        sequence: int | None = None,
    ) -> Rollout:
        """Change a rollout of a model.

        Args:
            name: of the model.
            percent: of the devices, from now on.
            progress: whether it goes on, from now on.
            sequence: of the release; the newest that was not stopped by default.

        Raises:
            UsageError: there is none, it was stopped before, or the percentage is none.
            StorageError: the change could not be written.
        """
        with self._changing() as before:
            found = self._to_change(name, sequence, before)
            update = {
                "percent": found.percent if percent is None else _percent(percent),
                "progress": progress or found.progress,
            }
            changed = found.model_copy(update=update)
            self._write(changed if each == found else each for each in before)
            return changed

    def _to_change(self, name: str, sequence: int | None, rollouts: Iterable[Rollout]) -> Rollout:
        """The one of this number, or the newest that was not stopped."""
        mine = [each for each in rollouts if each.name == name and sequence in (None, each.sequence)]
        if not mine:
            self.all_of(name)  # which says where there are none at all
            raise UsageError(f"release {sequence} of {name} is not, or no longer, on offer: propolis rollout show")
        found = next((each for each in mine if each.progress is not Progress.STOPPED), None)
        if found is None:
            raise UsageError(f"{mine[0].release} was stopped, for good: publish a newer one")
        return found

    def _acceptable(self, package: Path, now: float) -> Accepted:
        """What a package says, looked at as devices will, before anybody is offered it."""
        root_key = load_root(self._folder)
        trust = Trust(root_key, load_roster_of(root_key, self._folder))
        try:
            accepted = verify_package(package, trust, Expected(now, LARGEST_PLAINTEXT))
            keys = package.with_name(package.name + KEYS_SUFFIX)
            if manifest_of_keys(keys) != accepted.digest:
                raise UsageError(f"{keys} has the keys of another package")
        except RefusedError as error:
            raise UsageError(f"devices would refuse this package: {error}") from None
        return accepted

    def _place(self, package: Path, place: Path) -> None:
        """Copy a package and its keys to where they are delivered from."""
        try:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for suffix in (KEYS_SUFFIX, ""):
                file = place.with_name(place.name + suffix)
                remove_stale(file)
                write_atomically(file, _content(Path(f"{package}{suffix}")), mode=0o600)
        except OSError as error:
            raise StorageError(f"cannot copy {package} to {place}: {error.strerror}") from None

    @contextmanager
    def _changing(self) -> Iterator[tuple[Rollout, ...]]:
        try:
            self.home.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot make {self.home}: {error.strerror}") from None
        with locked(self.home / _LOCK_FILE):
            before = self.all()
            yield before
            self._sweep()

    def _write(self, rollouts: Iterable[Rollout]) -> None:
        remove_stale(self.index)
        kept = _needed(tuple(sorted(rollouts, key=lambda each: (each.name, -each.sequence))))
        write_atomically(self.index, _Index(rollouts=kept).model_dump_json(indent=1).encode() + b"\n", mode=0o600)

    def _sweep(self) -> None:
        """Remove packages that nobody is offered any more; a transfer under way has its file open."""
        kept = {self.package(each).parent for each in self.all()}
        for folder in self.home.glob("*/*"):
            if folder.is_dir() and folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def start_rollout(federation: Path, package: Path, percent: float) -> Rollout:
    """Hand a package over for delivery by the server whose folder this is; raises as `Rollouts.start` does."""
    return Rollouts(federation).start(package, percent)


def newest_sequence(federation: Path, name: str) -> int:
    """The number of the newest release of a model that was handed over here; 0 is none. Raises UsageError."""
    return max((each.sequence for each in Rollouts(federation).all() if each.name == name), default=0)


def _needed(rollouts: tuple[Rollout, ...]) -> tuple[Rollout, ...]:
    """By name the newest, and those down to one that all may have: what is on offer again where newer ones stop."""
    kept, enough = list[Rollout](), set[str]()
    for each in rollouts:
        is_newest = all(other.name != each.name for other in kept)
        if each.name not in enough:
            kept.append(each)
        if not is_newest and each.percent == 100 and each.progress is Progress.RUNNING:
            enough.add(each.name)
    return tuple(kept)


def _percent(percent: float) -> float:
    if not 0 <= percent <= 100:
        raise UsageError(f"a percentage is from 0 to 100, got {percent:g}")
    return float(percent)


def _content(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(_COPIED_BYTES):
            yield part

"""A version of a registry becomes a release: sealed for the devices, noted in the registry, and then given out.

A release's number is taken before anything is sealed, and the release is noted before its package can be had anywhere.
So who is interrupted leaves a number that nobody uses, or a release that never went out; publishing again mends both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from os.path import samestat
from pathlib import Path
from shutil import rmtree

from propolis.secure.errors import RefusedError, StorageError, UsageError
from propolis.secure.identity import DIGEST_BYTES
from propolis.secure.manifest import Kind, Manifest, Trial, Trust
from propolis.secure.release import LONGEST_MODEL_NAME, require_model_name, verify_delegation
from propolis.server.membership import Membership
from propolis.server.plaintext import PlainData
from propolis.server.publish import KEYS_SUFFIX, Facts, Recipient, recipients_of, seal_package
from propolis.server.registry import Registry
from propolis.server.registry_records import Version
from propolis.server.registry_releases import Demand, NewRelease
from propolis.server.release_key import ReleaseKey
from propolis.storage import locked, sync_folder

DAY_S = 24 * 3600
# Of outputs on the golden batch: float32 agrees much closer on all processors, int8 is held to the same.
LARGEST_DIFFERENCE = 1e-3
ENCRYPTED_FILE = "model.encrypted"
_LARGEST_MEASURE = 1e300
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a release may be installed, how a device tries it, and whether it is sealed to hybrid keys."""

    valid_days: int = 90
    trial: Trial = field(default_factory=lambda: Trial(LARGEST_DIFFERENCE))
    post_quantum: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Publisher:
    """Who releases, and for whom; make one with `Publisher.of`, which finds out whether that can be."""

    key: ReleaseKey
    trust: Trust
    recipients: tuple[Recipient, ...]

    @property
    def left_out(self) -> list[str]:
        """Names of the devices that have announced no hybrid key."""
        entries = self.trust.roster.roster.entries
        return [entries[one.index].name for one in self.recipients if one.hybrid_key is None]

    @classmethod
    def of(cls, federation: Path, key: ReleaseKey, model: str) -> Publisher:
        """The publisher of a model to the devices that have enrolled.

        Args:
            federation: the server's folder, with the roster and the devices.
            key: that releases.
            model: its name.

        Raises:
            UsageError: nobody has enrolled, the name is none of a release, or devices would refuse this key or roster.
        """
        require_model_name(model)
        membership = Membership(federation)
        trust = Trust(membership.root_key, membership.roster)
        now = time.time()
        try:
            trust.roster.require_current(now)
            delegation = verify_delegation(trust.root_key, trust.roster, key.delegation)
            delegation.require_valid(now)
            delegation.require_model(model)
            recipients = tuple(recipients_of(membership))
        except RefusedError as error:
            raise UsageError(f"devices would refuse this release: {error}") from None
        if not recipients:
            raise UsageError(f"no device has enrolled in {federation}: nobody could open the package")
        return cls(key, trust, recipients)


def release_version(
    registry: Registry,
    version: Version,
    publisher: Publisher,
    terms: Terms,
    out: Path,
    *,
    wanted: int | str | None = None,
    demand: Demand | None = None,
) -> Manifest:
    """Seal a version's artifacts, or its encrypted model, as its model's next release, note it, and write the package.

    Args:
        registry: that the version is in.
        version: with artifacts, unless it is encrypted.
        publisher: who releases.
        terms: of the release.
        out: a file that does not exist yet; the keys go beside it.
        wanted: the alias that the version was asked for as: it must be there still.
        demand: of the release's number.

    Returns:
        What the package says.

    Raises:
        UsageError: `out` is taken, the alias has moved, or devices would refuse the package.
        StorageError: something could not be written.
    """
    files = _files_of(registry, version)
    with _beside(out) as sealing:
        asked = (version.version if wanted is None else wanted, version.version)
        sequence, parent = registry.next_sequence(version.model, demand, asked)
        facts = _facts(version, sequence, parent, terms)
        sealed = seal_package(
            files,
            facts,
            publisher.key,
            publisher.recipients,
            publisher.trust,
            sealing,
            post_quantum=terms.post_quantum,
        )
        told = (sealed.release.digest, sealed.content_key, facts.created, facts.expires, parent)
        registry.add_release(version, NewRelease(sequence, *told))
        _move(sealing, out)
    return sealed.manifest


def _files_of(registry: Registry, version: Version) -> list[PlainData]:
    """What is in a release of a version."""
    files = [
        PlainData(each.name, Kind[each.kind.upper()], registry.artifact(version, each.name))
        for each in version.artifacts
    ]
    if version.is_encrypted:
        files.insert(0, PlainData(ENCRYPTED_FILE, Kind.ENCRYPTED, b"".join(registry.read(version))))
    return files


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A place from which the package can be moved to its own, for one publisher at a time; it is gone afterwards.

    Raises:
        UsageError: `out` is taken.
        StorageError: it cannot be written, or another one has published to it for too long.
    """
    folder = out.parent / f".sealing-{sha256(out.name.encode(errors='surrogateescape')).hexdigest()[:32]}"
    with ExitStack() as held:
        try:
            while not _entered(folder, held):
                held.close()
            for left in folder.iterdir():  # by a publisher that was killed
                if left.name != _LOCK:
                    left.unlink()
        except OSError as error:
            raise StorageError(f"cannot write {out}: {error.strerror}") from None
        try:
            _require_free(out)
            yield folder / "package"
        finally:
            rmtree(folder, ignore_errors=True)


def _entered(folder: Path, held: ExitStack) -> bool:
    """Whether the folder is this publisher's while `held` is; not where the one before has removed it in between."""
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        descriptor = held.enter_context(locked(folder / _LOCK))
        return samestat(os.fstat(descriptor), (folder / _LOCK).stat())
    except FileNotFoundError:
        return False
    except StorageError:
        if folder.exists():
            raise
        return False


def _require_free(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists: a release is never changed, give another --out")


def _move(package: Path, out: Path) -> None:
    """The keys first: the package is what says that there is a release; one that is there is not replaced."""
    _require_free(out)
    try:
        package.with_name(package.name + KEYS_SUFFIX).replace(out.with_name(out.name + KEYS_SUFFIX))
        try:
            os.link(package, out)
        except FileExistsError:
            _require_free(out)
        except OSError:  # a file system without links, such as a stick's: the lock keeps our own kind away
            package.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}") from None


def _facts(version: Version, sequence: int, parent: int, terms: Terms) -> Facts:
    now = int(time.time())
    return Facts(
        name=version.model,
        sequence=sequence,
        created=now,
        expires=now + terms.valid_days * DAY_S,
        model_version=version.version,
        parent=parent,
        run_id=_run_id(version),
        round=version.lineage.round or 0,
        evaluation=measures_of(version),
        trial=terms.trial,
    )


def measures_of(version: Version) -> dict[str, float]:
    """The metrics of a version, and under the file's name those of its artifacts, as far as a manifest can say them."""
    measures: dict[str, float | None] = dict(version.lineage.metrics)
    for evaluation in version.evaluations:
        if evaluation.artifact is not None:
            measures |= {f"{evaluation.artifact} {name}": value for name, value in evaluation.metrics.items()}
    return {
        name: value
        for name, value in measures.items()
        if value is not None and abs(value) <= _LARGEST_MEASURE and 0 < len(name) <= LONGEST_MODEL_NAME
    }


def _run_id(version: Version) -> bytes:
    """Empty where the run has no name, or one that was not drawn by a registration."""
    try:
        run_id = bytes.fromhex(version.lineage.run_id or "")
    except ValueError:
        return b""
    return run_id if len(run_id) <= DIGEST_BYTES else b""

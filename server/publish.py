"""A model becomes a package: files -> manifest -> signature -> ciphertext, and the content key for each device.

The ciphertext is made a chunk at a time, so memory does not grow with the model. The keys are written before the
package, which is the only thing that says that there is a release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from propolis.package import Header, write_keys
from propolis.secure.announcement import verify_announcement
from propolis.secure.content import WrappedKey, ciphertext_digest, content_context, wrap_key
from propolis.secure.envelope import chunk_count, commit_to, new_content_key, seal_content, sealed_size
from propolis.secure.errors import RefusedError, StorageError, UsageError
from propolis.secure.identity import descriptor_digest
from propolis.secure.kem import Kem
from propolis.secure.manifest import (
    LARGEST_PLAINTEXT,
    Expected,
    Manifest,
    Measure,
    Release,
    Trial,
    Trust,
    accept,
    sign_manifest,
)
from propolis.secure.release import require_model_name
from propolis.server.membership import Membership
from propolis.server.plaintext import PlainData, PlainFile, Plaintext
from propolis.server.release_key import ReleaseKey
from propolis.storage import write_atomically

KEYS_SUFFIX = ".keys"
_COPIED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Facts:
    """What a manifest says besides what follows from the files.

    Attributes:
        name: of the model.
        sequence: higher than that of any release of this name before.
        created, expires: seconds since 1970; the second is the last moment to install it.
        model_version: in the registry.
        parent: the sequence before; 0 is none.
        run_id, round: that the model comes from.
        epsilon, delta: privacy spent; 0 claims none.
        evaluation: what the model was found to have, by name.
        trial: how a device tries it.
    """

    name: str
    sequence: int
    created: int
    expires: int
    model_version: int = 0
    parent: int = 0
    run_id: bytes = b""
    round: int = 0
    epsilon: float = 0.0
    delta: float = 0.0
    evaluation: Mapping[str, float] = field(default_factory=dict)
    trial: Trial = field(default_factory=Trial)


@dataclass(frozen=True, slots=True)
class Recipient:
    """A device that a package is for.

    Attributes:
        index: its place in the roster.
        descriptor: digest of its descriptor.
        hpke_key: in that descriptor, X25519.
        hybrid_key: that it has announced; None where it has not.
    """

    index: int
    descriptor: bytes
    hpke_key: bytes
    hybrid_key: bytes | None = None

    def key_for(self, kem: Kem) -> bytes:
        """What a content key is sealed to; raises UsageError where the device has no such key."""
        key = self.hpke_key if kem is Kem.X25519 else self.hybrid_key
        if key is None:
            raise UsageError(f"device {self.index} has announced no post-quantum key: it cannot be given this package")
        return key


@dataclass(frozen=True, slots=True, repr=False)
class Sealed:
    """A package that was written; who has its content key can open it, and let devices that come later do so."""

    release: Release
    manifest: Manifest
    content_key: bytes

    def wrap(self, recipient: Recipient) -> WrappedKey:
        """The content key for a device, sealed as the manifest says.

        Raises:
            UsageError: that is with a hybrid key, and the device has announced none.
        """
        kem, digest = Kem(self.manifest.kem), self.release.digest
        return wrap_key(self.content_key, digest, recipient.index, recipient.descriptor, recipient.key_for(kem), kem)


def recipients_of(membership: Membership) -> list[Recipient]:
    """The devices that have enrolled and are not revoked.

    Raises:
        TrustError: a descriptor is not what the roster stands for, or a hybrid key not what its device announced.
        UsageError: a descriptor or a hybrid key cannot be read.
    """
    places = range(len(membership.roster.roster.entries))
    return [found for index in places if (found := recipient_of(membership, index)) is not None]


def recipient_of(membership: Membership, index: int) -> Recipient | None:
    """The device in a place of the roster; None where it has not enrolled, or is revoked. Raises as `recipients_of`."""
    entry = membership.roster.roster.entries[index]
    signed = None if entry.revoked else membership.enrolled(index)
    if signed is None:
        return None
    descriptor, digest = membership.roster.descriptor(signed), descriptor_digest(signed)
    announced = membership.announced(index)
    hybrid_key = None if announced is None else verify_announcement(descriptor, digest, announced)
    return Recipient(index, digest, descriptor.hpke_key, hybrid_key)


def seal_package(
    files: Sequence[PlainFile | PlainData],
    facts: Facts,
    release_key: ReleaseKey,
    recipients: Sequence[Recipient],
    trust: Trust,
    out: Path,
    *,
    post_quantum: bool = False,
) -> Sealed:
    """Write a package, and beside it, with ``.keys`` added to its name, the keys of the devices.

    Args:
        files: of the model, at least one byte in all.
        facts: about it.
        release_key: that signs.
        recipients: who can open it.
        trust: of the devices: what they would refuse is not written.
        out: a file that does not exist yet.
        post_quantum: seal to the devices' hybrid keys; who has announced none is left out.

    Raises:
        UsageError: a file cannot be read or packed, `out` is taken, devices would refuse the package, or no device has
            a hybrid key where they are wanted.
        StorageError: it could not be written.
    """
    require_model_name(facts.name)
    if out.exists():
        raise UsageError(f"{out} exists: a release is never changed, give another --out")
    kem = Kem.MLKEM768_X25519 if post_quantum else Kem.X25519
    if post_quantum:
        recipients = _with_hybrid_key(recipients)
    plaintext = Plaintext(files)
    federation, content_key = trust.roster.roster.federation, new_content_key()
    context = content_context(federation, facts.name, facts.sequence, plaintext.digest)
    try:
        with TemporaryFile(dir=out.parent) as spool:
            chunk_digests = _encrypt(plaintext, content_key, context, spool)
            manifest = _manifest(facts, federation, plaintext, commit_to(content_key), chunk_digests, kem)
            release = Release(release_key.delegation, sign_manifest(manifest, release_key.key))
            _require_acceptable(release, trust, facts)
            sealed = Sealed(release, manifest, content_key)
            keys = (sealed.wrap(recipient) for recipient in sorted(recipients, key=lambda one: one.index))
            write_keys(out.with_name(out.name + KEYS_SUFFIX), release.digest, keys, kem)
            header = Header(release.delegation, release.manifest, chunk_digests)
            write_atomically(out, chain((header.framed,), _rewound(spool)))
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}") from None
    return sealed


def _with_hybrid_key(recipients: Sequence[Recipient]) -> list[Recipient]:
    able = [recipient for recipient in recipients if recipient.hybrid_key is not None]
    if not able:
        raise UsageError("no device has announced a post-quantum key yet: seal without --post-quantum")
    return able


def _encrypt(plaintext: Plaintext, content_key: bytes, context: bytes, spool: BinaryIO) -> bytes:
    """Write the ciphertext; returns the digests of its chunks, one after another."""
    digests = []
    for chunk in seal_content(content_key, context, plaintext.chunks(), chunk_count(plaintext.size)):
        digests.append(hashlib.sha256(chunk).digest())
        spool.write(chunk)
    return b"".join(digests)


def _rewound(spool: BinaryIO) -> Iterator[bytes]:
    spool.seek(0)
    return iter(lambda: spool.read(_COPIED_BYTES), b"")


def _manifest(
    facts: Facts, federation: bytes, plaintext: Plaintext, commitment: bytes, digests: bytes, kem: Kem
) -> Manifest:
    return Manifest(
        federation=federation,
        name=facts.name,
        sequence=facts.sequence,
        model_version=facts.model_version,
        plaintext_digest=plaintext.digest,
        plaintext_size=plaintext.size,
        ciphertext_digest=ciphertext_digest(digests),
        ciphertext_size=sealed_size(plaintext.size),
        key_commitment=commitment,
        parent=facts.parent,
        run_id=facts.run_id,
        round=facts.round,
        epsilon=facts.epsilon,
        delta=facts.delta,
        evaluation=tuple(Measure(name, value) for name, value in sorted(facts.evaluation.items())),
        created=facts.created,
        expires=facts.expires,
        files=plaintext.files,
        trial=facts.trial,
        kem=int(kem),
    )


def _require_acceptable(release: Release, trust: Trust, facts: Facts) -> None:
    """Look at a release as devices will."""
    try:
        accept(release, trust, Expected(facts.created, LARGEST_PLAINTEXT, facts.name))
    except RefusedError as error:
        raise UsageError(f"devices would refuse this package: {error}") from None

"""What a release says of a model, and every check of it, in one place and without I/O.

A release is a manifest, signed with a release key, and the delegation of that key, signed by the root. What is checked
before a device believes it, in this order: who released it, whether for this federation and under this name, whether
its time is over, whether it is newer than what was trusted before, and whether its sizes and its files' names can be.
The threats are those of The Update Framework (theupdateframework.github.io/specification, section 1.5.2): arbitrary
software, roll-back, freezing, endless data, mix-and-match.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from propolis.protos import model_pb2 as pb
from propolis.secure import labels
from propolis.secure.envelope import sealed_size
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.identity import DIGEST_BYTES, Signed, SigningKey, TrustedRoster, sign, verify
from propolis.secure.kem import Kem
from propolis.secure.release import LARGEST_NUMBER, LONGEST_MODEL_NAME, Delegation, is_model_name, verify_delegation
from propolis.secure.wire import between, many, sized, version_field

# What the format carries; what a device takes is its own affair.
LARGEST_PLAINTEXT = 2**32
MOST_FILES, MOST_MEASURES = 64, 256
LONGEST_FILE_NAME = 100
_LARGEST_MANIFEST = 2**16
_LARGEST_VALUE = 1e300
_FILE_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_FILE_NAME - 1}}}")


class Kind(IntEnum):
    """What a file of a package is for; a device leaves alone what it does not know."""

    OTHER = 1
    ONNX = 2
    INT8 = 3  # ONNX with int8 weights
    GOLDEN = 4  # inputs, and the outputs that the model must have for them
    ENCRYPTED = 5  # a global model under a key of homomorphic encryption, which each device exports itself


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A file of the plaintext: its SHA-256, and one of `Kind`."""

    name: str = sized(1, LONGEST_FILE_NAME)
    size: int = between(0, LARGEST_PLAINTEXT)
    digest: bytes = sized(DIGEST_BYTES)
    kind: int = between(1, 255)


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that the model was found to have, such as its accuracy."""

    name: str = sized(1, LONGEST_MODEL_NAME)
    value: float = between(-_LARGEST_VALUE, _LARGEST_VALUE)


@dataclass(frozen=True, slots=True)
class Trial:
    """How a device tries the model: difference from the golden batch's outputs, and seconds, that it allows."""

    largest_difference: float = between(0, _LARGEST_VALUE, default=1e-3)
    seconds: float = between(0.001, 3600, default=60.0)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is released; the fields are those of `protos/model.proto`, where their units are."""

    federation: bytes = sized(DIGEST_BYTES)
    name: str = sized(1, LONGEST_MODEL_NAME)
    sequence: int = between(1, LARGEST_NUMBER)
    model_version: int = between(0, LARGEST_NUMBER)
    plaintext_digest: bytes = sized(DIGEST_BYTES)
    plaintext_size: int = between(1, LARGEST_PLAINTEXT)
    ciphertext_digest: bytes = sized(DIGEST_BYTES)
    ciphertext_size: int = between(1, 2 * LARGEST_PLAINTEXT)
    key_commitment: bytes = sized(DIGEST_BYTES)
    parent: int = between(0, LARGEST_NUMBER)
    run_id: bytes = sized(0, DIGEST_BYTES)
    round: int = between(0, LARGEST_NUMBER)
    epsilon: float = between(0, _LARGEST_VALUE)
    delta: float = between(0, 1)
    evaluation: tuple[Measure, ...] = many(MOST_MEASURES)
    created: int = between(0, LARGEST_NUMBER)
    expires: int = between(0, LARGEST_NUMBER)
    files: tuple[PackagedFile, ...] = many(MOST_FILES)
    trial: Trial = Trial()
    version: int = version_field()
    kem: int = between(Kem.X25519, Kem.MLKEM768_X25519, default=int(Kem.X25519), implied=True)


@dataclass(frozen=True, slots=True)
class Release:
    """A signed manifest and the signed delegation of the key that signed it: the exact bytes that travel."""

    delegation: Signed
    manifest: Signed

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for this very manifest."""
        return labels.digest(labels.MANIFEST, self.manifest.payload)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A release that was found to hold.

    Attributes:
        manifest: what it says.
        digest: `Release.digest`.
        serial: of the release key.
    """

    manifest: Manifest
    digest: bytes
    serial: int


@dataclass(frozen=True, slots=True)
class Trust:
    """What a device holds releases against: the root that it enrolled with, and the newest roster that it has seen."""

    root_key: bytes
    roster: TrustedRoster


@dataclass(frozen=True, slots=True)
class Expected:
    """What a device is about to take.

    Attributes:
        now: seconds since 1970.
        largest: bytes of the plaintext that it takes at most.
        name: of the model; None takes any.
        sequence, manifest: the highest release of this name that was trusted; 0 and empty before the first.
    """

    now: float
    largest: int
    name: str | None = None
    sequence: int = 0
    manifest: bytes = b""


def sign_manifest(manifest: Manifest, release_key: SigningKey) -> Signed:
    """The manifest as devices accept it."""
    return sign(labels.MANIFEST, release_key.private, manifest, pb.Manifest)


def accept(release: Release, trust: Trust, expected: Expected) -> Accepted:
    """What a release says, when it may be installed now.

    Raises:
        TrustError, PeerError: it may not; see the module for what is checked.
    """
    trust.roster.require_current(expected.now)
    delegation = verify_delegation(trust.root_key, trust.roster, release.delegation)
    delegation.require_valid(expected.now)
    manifest = _signed_by(delegation, release)
    _require_name(manifest, expected)
    if expected.now > manifest.expires:
        raise TrustError(Refusal.EXPIRED, f"{_of(manifest)} was to be installed until {manifest.expires}: it is over")
    _require_newer(manifest, release, expected)
    if manifest.plaintext_size > expected.largest:
        taken = f"this device takes {expected.largest}"
        raise PeerError(Refusal.POLICY, f"{_of(manifest)} has {manifest.plaintext_size} bytes, {taken}")
    _require_consistent(manifest)
    return Accepted(manifest, release.digest, delegation.serial)


def accept_again(release: Release, trust: Trust) -> Accepted:
    """What a release says that was accepted before: its time may be over by now, but its key must not be revoked.

    Raises:
        TrustError, PeerError: it does not hold.
    """
    delegation = verify_delegation(trust.root_key, trust.roster, release.delegation)
    manifest = _signed_by(delegation, release)
    _require_consistent(manifest)
    return Accepted(manifest, release.digest, delegation.serial)


def is_file_name(name: str) -> bool:
    """Whether a file of a package may be called so: one part of a path, the same on every system."""
    return _FILE_NAME.fullmatch(name) is not None


def _signed_by(delegation: Delegation, release: Release) -> Manifest:
    refusal, limit = Refusal.RELEASE_KEY, _LARGEST_MANIFEST
    key = delegation.public_key
    manifest = verify(labels.MANIFEST, key, release.manifest, Manifest, pb.Manifest, refusal, limit=limit)
    if manifest.federation != delegation.federation:
        raise TrustError(Refusal.PACKAGE, "the package is another federation's")
    if not is_model_name(manifest.name):
        raise PeerError(Refusal.MALFORMED, "the package's model has a name that none can have")
    delegation.require_model(manifest.name)
    return manifest


def _require_name(manifest: Manifest, expected: Expected) -> None:
    if expected.name is not None and manifest.name != expected.name:
        raise TrustError(Refusal.PACKAGE, f"the package is of the model {manifest.name}, expected {expected.name}")


def _require_newer(manifest: Manifest, release: Release, expected: Expected) -> None:
    """The one that was trusted last may be tried again, for it may not have got as far as being installed."""
    if manifest.sequence < expected.sequence:
        raise TrustError(Refusal.ROLLED_BACK, f"{_of(manifest)} is older than {expected.sequence}, seen before")
    if manifest.sequence == expected.sequence and release.digest != expected.manifest:
        raise TrustError(Refusal.ROLLED_BACK, f"{_of(manifest)} is not the one of that number seen before")


def _require_consistent(manifest: Manifest) -> None:
    """Sizes that add up, names that lead nowhere else, a parent that came before, and one model in one form."""
    if manifest.parent >= manifest.sequence:
        raise PeerError(Refusal.MALFORMED, f"{_of(manifest)} says to come after {manifest.parent}")
    sizes = sum(file.size for file in manifest.files)
    if sizes != manifest.plaintext_size or manifest.ciphertext_size != sealed_size(sizes):
        raise PeerError(Refusal.MALFORMED, f"the sizes in {_of(manifest)} do not add up")
    for file in manifest.files:
        if not is_file_name(file.name):
            raise PeerError(Refusal.MALFORMED, f"a file of {_of(manifest)} has a name that none can have")
    ((_, most),) = Counter(file.name.lower() for file in manifest.files).most_common(1)
    if most > 1:
        raise PeerError(Refusal.MALFORMED, f"two files of {_of(manifest)} have one name")
    kinds = Counter(file.kind for file in manifest.files)
    if kinds[Kind.ENCRYPTED] and kinds[Kind.ENCRYPTED] + kinds[Kind.ONNX] + kinds[Kind.INT8] > 1:
        raise PeerError(Refusal.MALFORMED, f"{_of(manifest)} has an encrypted model and another one")


def _of(manifest: Manifest) -> str:
    return f"release {manifest.sequence} of {manifest.name}"

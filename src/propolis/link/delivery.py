"""What travels when a device takes a release: the messages of the service Delivery, and how long one waits for them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from propolis.package import Header
from propolis.secure.content import WrappedKey
from propolis.secure.envelope import SEALED_CHUNK_BYTES
from propolis.secure.he.held import LARGEST_BUNDLE
from propolis.secure.identity import DIGEST_BYTES, Signed
from propolis.secure.release import LARGEST_NUMBER, LONGEST_MODEL_NAME
from propolis.secure.wire import between, many, sized, version_field

SERVICE = "propolis.model.v1.Delivery"
MOST_OFFERS = 256
LONGEST_REASON = 40
# Of a request; a device that has many models installed says so in one.
LARGEST_REQUEST = 2**16
_LARGEST_CHUNK = 2**31 - 1


class Outcome(IntEnum):
    """How far a package got on a device."""

    FETCHED = 1
    VERIFIED = 2
    PROBE_PASSED = 3
    INSTALLED = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Release:
    """A release: the model's name, its number, and the digest of the manifest."""

    name: str = sized(1, LONGEST_MODEL_NAME)
    sequence: int = between(1, LARGEST_NUMBER)
    manifest: bytes = sized(DIGEST_BYTES)

    def __str__(self) -> str:
        """``release 3 of digits``."""
        return f"release {self.sequence} of {self.name}"


@dataclass(frozen=True, slots=True)
class LookRequest:
    """What is there for this device, which has these installed, and parts of those, please."""

    installed: tuple[Release, ...] = many(MOST_OFFERS)
    begun: tuple[Release, ...] = many(MOST_OFFERS)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class LookReply:
    """The number of the newest roster, the releases that are for this device, and whether to announce a hybrid key."""

    roster: int = between(0, LARGEST_NUMBER)
    offers: tuple[Release, ...] = many(MOST_OFFERS)
    announce: bool = False
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class AnnounceRequest:
    """An `Announcement`, signed by the device: post-quantum packages can be sealed to it from now on."""

    announcement: Signed
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class AnnounceReply:
    """It is kept."""

    version: int = version_field()


@dataclass(frozen=True, slots=True)
class RosterRequest:
    """The newest roster, please."""

    version: int = version_field()


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """The header of a package and this device's key to it, please."""

    release: Release
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class OpenReply:
    """What `OpenRequest` asks for."""

    header: Header
    key: WrappedKey
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """The chunks of a package from this number on, please."""

    release: Release
    first: int = between(0, _LARGEST_CHUNK)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk, or a piece of a roster."""

    data: bytes = sized(1, SEALED_CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """How far a release got: one of `Outcome`, and for a failure its `Refusal` in words."""

    release: Release
    outcome: int = between(1, max(Outcome))
    reason: str = sized(0, LONGEST_REASON)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class ReportReply:
    """It is noted."""

    version: int = version_field()


@dataclass(frozen=True, slots=True)
class HeKeyRequest:
    """This device's part of the key of homomorphic encryption, unless it has that of this id, please."""

    have: bytes = sized(0, DIGEST_BYTES)
    version: int = version_field()


@dataclass(frozen=True, slots=True, repr=False)
class HeKeyReply:
    """A `KeyBundle`; nothing where the server has no key, or the device has it."""

    bundle: bytes = sized(0, LARGEST_BUNDLE)
    version: int = version_field()

"""What travels in each exchange of a round; `to_bytes` and `from_bytes` are the wire format (protos/secagg.proto)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from propolis.protos import secagg_pb2 as pb
from propolis.secure.envelope import OVERHEAD_BYTES
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.identity import LARGEST_INDEX, SIGNATURE_BYTES, Signed
from propolis.secure.merkle import HASH_BYTES
from propolis.secure.shamir import SHARE_BYTES
from propolis.secure.wire import (
    FORMAT_VERSION,
    LARGEST_MESSAGE,
    between,
    decode,
    encode,
    many,
    parse,
    serialized,
    sized,
    version_field,
)

T = TypeVar("T")

# Ed25519, X25519, HPKE(X25519, HKDF-SHA256, AES-128-GCM), Shamir over 2^256 + 297, AES-256-CTR, SHA-256.
SUITE = 1

# A sealed pair of shares and the hashes of the two: one record of a prepare reply.
BOX_BYTES = OVERHEAD_BYTES + 2 * SHARE_BYTES
RECORD_BYTES = BOX_BYTES + 2 * HASH_BYTES

_MOST_NEIGHBOURS = 2**12
_MOST_NAMES = 1024
_LONGEST_NAME = 200
# Names and lanes of all the metrics of an upload, and everything else that is small in it.
LARGEST_METRICS = _MOST_NAMES * (_LONGEST_NAME + 12) + 4096
_LONGEST_PATH = 32 * 20
_LARGEST_VECTOR = 2**30


@dataclass(frozen=True, slots=True)
class HelloRequest:
    """Who are you? Here is the roster; sign the challenge."""

    roster: Signed
    challenge: bytes = sized(32)


@dataclass(frozen=True, slots=True)
class HelloReply:
    """The device's descriptor, the prekey for its next round, and the proof that it is there."""

    descriptor: Signed
    prekey: Signed
    proof: bytes = sized(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class NeighbourKeys:
    """What a device needs to seal something to a neighbour."""

    descriptor: Signed
    prekey: Signed


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """Take part in the round of this plan: the plan's bytes, this device's prekey number, its neighbours' keys."""

    plan: bytes = sized(1, 2**23)
    prekey_number: int = between(0, 2**62)
    neighbours: tuple[NeighbourKeys, ...] = many(_MOST_NEIGHBOURS)


@dataclass(frozen=True, slots=True)
class PrepareReply:
    """The signed head, the prekey for the round after this, and a record for each neighbour in rising order."""

    head: Signed
    next_prekey: Signed
    deliveries: bytes = sized(RECORD_BYTES, RECORD_BYTES * _MOST_NEIGHBOURS)


@dataclass(frozen=True, slots=True)
class Head:
    """What a device signs of its preparation."""

    plan_digest: bytes = sized(32)
    index: int = between(0, LARGEST_INDEX)
    mask_key: bytes = sized(32)
    seed_commitment: bytes = sized(32)
    deliveries_root: bytes = sized(32)
    roster_number: int = between(1, 2**62)
    next_prekey: bytes = sized(32)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """Train, and mask for these neighbours."""

    plan_digest: bytes = sized(32)
    heads: tuple[Signed, ...] = many(_MOST_NEIGHBOURS)


@dataclass(frozen=True, slots=True, repr=False)
class UploadReply:
    """The masked update and lanes, packed, and what the last lanes are called."""

    plan_digest: bytes = sized(32)
    vector: bytes = sized(0, _LARGEST_VECTOR)
    lanes: bytes = sized(0, _LARGEST_VECTOR)
    metrics: tuple[str, ...] = sized(1, _LONGEST_NAME, count=_MOST_NAMES)


@dataclass(frozen=True, slots=True)
class ConfirmRequest:
    """Sign that these devices, a bitmap over the roster, are those whose updates arrived."""

    plan_digest: bytes = sized(32)
    alive: bytes = sized(1, 2**17)


@dataclass(frozen=True, slots=True)
class ConfirmReply:
    """The signature under the digest of plan and alive set."""

    plan_digest: bytes = sized(32)
    signature: bytes = sized(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One dealer's record for this device, with the proof that the dealer signed it."""

    dealer: int = between(0, LARGEST_INDEX)
    record: bytes = sized(RECORD_BYTES)
    path: bytes = sized(0, _LONGEST_PATH)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """One device's signature on the alive set."""

    index: int = between(0, LARGEST_INDEX)
    signature: bytes = sized(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class UnmaskRequest:
    """Reveal one share of each neighbour: of the seed of those alive, of the mask key of those that dropped."""

    plan_digest: bytes = sized(32)
    alive: tuple[int, ...] = between(0, LARGEST_INDEX, count=_MOST_NEIGHBOURS)
    dropped: tuple[int, ...] = between(0, LARGEST_INDEX, count=_MOST_NEIGHBOURS)
    deliveries: tuple[Delivery, ...] = many(_MOST_NEIGHBOURS)
    confirmations: tuple[Confirmation, ...] = many(_MOST_NEIGHBOURS)


@dataclass(frozen=True, slots=True, repr=False)
class Share:
    """A share that its dealer made."""

    dealer: int = between(0, LARGEST_INDEX)
    value: bytes = sized(SHARE_BYTES)


@dataclass(frozen=True, slots=True, repr=False)
class UnmaskReply:
    """The shares; a record that did not open is left out."""

    plan_digest: bytes = sized(32)
    shares: tuple[Share, ...] = many(_MOST_NEIGHBOURS)


# What is parsed at all, in bytes: most messages are as long as there are neighbours.
_LARGEST_USUAL = 2**22
_LIMIT_OF: dict[type, int] = {HelloRequest: LARGEST_MESSAGE, UploadReply: 2**30}

_KIND_OF: dict[type, tuple[int, type[Message]]] = {
    HelloRequest: (1, pb.HelloRequest),
    HelloReply: (2, pb.HelloReply),
    PrepareRequest: (3, pb.PrepareRequest),
    PrepareReply: (4, pb.PrepareReply),
    UploadRequest: (5, pb.UploadRequest),
    UploadReply: (6, pb.UploadReply),
    ConfirmRequest: (7, pb.ConfirmRequest),
    ConfirmReply: (8, pb.ConfirmReply),
    UnmaskRequest: (9, pb.UnmaskRequest),
    UnmaskReply: (10, pb.UnmaskReply),
}


def to_bytes(message: object) -> bytes:
    """A message as it travels."""
    kind, proto = _KIND_OF[type(message)]
    return serialized(pb.Wire(version=FORMAT_VERSION, suite=SUITE, kind=kind, body=encode(message, proto)))


def from_bytes(cls: type[T], data: bytes, limit: int | None = None) -> T:
    """The message of type `cls` in a peer's bytes.

    Args:
        cls: what is expected.
        data: what came.
        limit: bytes, where the receiver knows better than the type how long it may be.

    Raises:
        PeerError: too long, another version or suite, another message, or a field out of its bounds.
    """
    kind, proto = _KIND_OF[cls]
    wire = parse(pb.Wire, data, limit or _LIMIT_OF.get(cls, _LARGEST_USUAL))
    if (wire.version, wire.suite) != (FORMAT_VERSION, SUITE):
        raise PeerError(Refusal.MALFORMED, f"expected version {FORMAT_VERSION} of the protocol in suite {SUITE}")
    if wire.kind != kind:
        raise PeerError(Refusal.MALFORMED, f"expected a {cls.__name__}")
    return decode(cls, wire.body, proto, len(wire.body))


def to_bitmap(indices: Sequence[int], size: int) -> bytes:
    """Indices below `size` as a bitmap, lowest bit first.

    >>> to_bitmap([0, 9], 10).hex()
    '0102'
    """
    bitmap = bytearray((size + 7) // 8)
    for index in indices:
        bitmap[index // 8] |= 1 << index % 8
    return bytes(bitmap)


def from_bitmap(bitmap: bytes) -> tuple[int, ...]:
    """The indices in a bitmap, rising."""
    return tuple(8 * place + bit for place, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1)

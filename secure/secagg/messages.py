"""What travels in each exchange of a round; `to_bytes` and `from_bytes` are the wire format (protos/secagg.proto)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
)

T = TypeVar("T")

# Ed25519, X25519, HPKE(X25519, HKDF-SHA256, AES-128-GCM), Shamir over 2^128 - 159, AES-256-CTR, SHA-256.
SUITE = 1

# First bytes of the plan's digest, by which requests and replies name their round: they tell rounds apart and prove
# nothing. Whoever sends a message may write any tag into it; what counts is bound to the whole digest.
TAG_BYTES = 4

# A sealed pair of shares and the hashes of the two: one record of a prepare reply.
BOX_BYTES = OVERHEAD_BYTES + 2 * SHARE_BYTES
RECORD_BYTES = BOX_BYTES + 2 * HASH_BYTES

_MOST_NEIGHBOURS = 2**12
_MOST_NAMES = 1024
_LONGEST_NAME = 200
# Names and lanes of all the metrics of an upload, and everything else that is small in it.
LARGEST_METRICS = _MOST_NAMES * (_LONGEST_NAME + 12) + 4096
_LONGEST_PATH = HASH_BYTES * 20
_LONGEST_BITMAP = _MOST_NEIGHBOURS // 8
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
    """Take part in the round of this plan.

    Attributes:
        plan: its bytes.
        prekey_number: of this device's own prekey.
        prekeys: of each neighbour, in rising order.
        descriptors: of the neighbours that this device has not been told of before.
    """

    plan: bytes = sized(1, 2**23)
    prekey_number: int = between(0, 2**62)
    prekeys: tuple[Signed, ...] = many(_MOST_NEIGHBOURS)
    descriptors: tuple[Signed, ...] = many(_MOST_NEIGHBOURS)


@dataclass(frozen=True, slots=True)
class PrepareReply:
    """The signed head, and what its root is over: see `propolis.secure.secagg.preparation`.

    Attributes:
        next_prekey: for the round after this.
        deliveries: a record for each neighbour in rising order.
    """

    head: Signed
    next_prekey: Signed
    deliveries: bytes = sized(RECORD_BYTES, RECORD_BYTES * _MOST_NEIGHBOURS)
    seed_commitment: bytes = sized(HASH_BYTES)


@dataclass(frozen=True, slots=True)
class Head:
    """What a device signs of its preparation, in the context of plan and index: all that its neighbours need."""

    mask_key: bytes = sized(32)
    root: bytes = sized(HASH_BYTES)


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """Train, and mask for these neighbours.

    Attributes:
        silent: which of the neighbours did not prepare, as `marks`.
        heads: of the others, in rising order.
    """

    round_tag: bytes = sized(TAG_BYTES)
    silent: bytes = sized(0, _LONGEST_BITMAP)
    heads: tuple[Signed, ...] = many(_MOST_NEIGHBOURS)


@dataclass(frozen=True, slots=True, repr=False)
class UploadReply:
    """The masked update and lanes, packed, and what the last lanes are called."""

    round_tag: bytes = sized(TAG_BYTES)
    vector: bytes = sized(0, _LARGEST_VECTOR)
    lanes: bytes = sized(0, _LARGEST_VECTOR)
    metrics: tuple[str, ...] = sized(1, _LONGEST_NAME, count=_MOST_NAMES)


@dataclass(frozen=True, slots=True)
class ConfirmRequest:
    """Sign that these devices, a bitmap over the roster, are those whose updates arrived."""

    round_tag: bytes = sized(TAG_BYTES)
    alive: bytes = sized(1, 2**17)


@dataclass(frozen=True, slots=True)
class ConfirmReply:
    """The signature under the digest of plan and alive set."""

    round_tag: bytes = sized(TAG_BYTES)
    signature: bytes = sized(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """One device's signature on the alive set."""

    index: int = between(0, LARGEST_INDEX)
    signature: bytes = sized(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class UnmaskRequest:
    """Reveal one share of each masking neighbour: of the seed of those alive, of the key of those that dropped.

    The masking neighbours are those whose heads the device was given, in rising order.

    Attributes:
        dropped: which of them dropped, as `marks`; the others are alive, and so is the device.
        deliveries: of each of them, its record for this device and the record's path.
    """

    round_tag: bytes = sized(TAG_BYTES)
    dropped: bytes = sized(0, _LONGEST_BITMAP)
    deliveries: bytes = sized(0, (RECORD_BYTES + _LONGEST_PATH) * _MOST_NEIGHBOURS)
    confirmations: tuple[Confirmation, ...] = many(_MOST_NEIGHBOURS)


@dataclass(frozen=True, slots=True, repr=False)
class UnmaskReply:
    """The shares of the masking neighbours in rising order, without those whose records did not open.

    Attributes:
        shares: one after the other.
        unopened: whose records did not open, as `marks`.
    """

    round_tag: bytes = sized(TAG_BYTES)
    shares: bytes = sized(0, SHARE_BYTES * _MOST_NEIGHBOURS)
    unopened: bytes = sized(0, _LONGEST_BITMAP)


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


def marks(chosen: Collection[int], among: Sequence[int]) -> bytes:
    """Which of the members of a group are chosen, as a bitmap over their places; empty when nobody is.

    >>> marks([7], [3, 5, 7]).hex(), marks([], [3, 5, 7]).hex()
    ('04', '')
    """
    places = [place for place, member in enumerate(among) if member in chosen]
    return to_bitmap(places, len(among)) if places else b""


def marked(bitmap: bytes, among: Sequence[int]) -> frozenset[int]:
    """The members that `marks` marked; raises PeerError when the bitmap is not one that it makes for this group."""
    places = from_bitmap(bitmap)
    if bitmap and (not places or places[-1] >= len(among) or len(bitmap) != len(to_bitmap((), len(among)))):
        raise PeerError(Refusal.SETS, f"a bitmap of {len(bitmap)} bytes does not fit {len(among)} devices")
    return frozenset(among[place] for place in places)

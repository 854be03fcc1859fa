"""What travels when a model is trained encrypted: the plan of an attempt, a device's upload, the sum of a round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from propolis.protos import he_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.he.tag import refused
from propolis.secure.identity import DIGEST_BYTES, LARGEST_INDEX
from propolis.secure.secagg.messages import from_bitmap
from propolis.secure.secagg.plan import Kind
from propolis.secure.secagg.runs import RUN_ID_BYTES
from propolis.secure.wire import LARGEST_MESSAGE, between, decode, decode_exactly, encode, many, sized, version_field

ROUND_TAG_BYTES = 16
MOST_METRICS, LONGEST_NAME = 256, 1000
_MOST_ENTRIES, _MOST_DIMENSIONS = 2**16, 32
_MOST_VALUES = 2**28
_LARGEST_SUM = 2**31 - 1
_DTYPES = frozenset(
    {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64"}
)


@dataclass(frozen=True, slots=True)
class Entry:
    """An array of the model; `exact` is for what a coarse grid will not do."""

    name: str = sized(1, LONGEST_NAME)
    dtype: str = sized(1, 16)
    shape: tuple[int, ...] = between(0, _MOST_VALUES, count=_MOST_DIMENSIONS)
    exact: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class EncryptedPlan:
    """The terms of one attempt at one round; (run_id, round, attempt) names it and never comes twice.

    Attributes:
        run_id: see `propolis.secure.secagg.runs`.
        round: from 1, as the application counts.
        attempt: rises with every try within a round.
        kind: `Kind`.
        roster_number, roster_digest: the roster that the indices refer to.
        key_id: of the key that everything is under.
        weight_key: the metric that is the weight.
        max_weight: largest weight, public; a larger one is cut to it.
        range: smallest magnitude that the first round has room for in every array.
        entries: the arrays that devices send, in their order; none in an evaluation.
    """

    run_id: bytes = sized(RUN_ID_BYTES)
    round: int = between(0, 2**31)
    attempt: int = between(0, 2**31)
    kind: int = between(1, 2)
    roster_number: int = between(1, 2**62)
    roster_digest: bytes = sized(DIGEST_BYTES)
    key_id: bytes = sized(DIGEST_BYTES)
    weight_key: str = sized(1, LONGEST_NAME)
    max_weight: float = between(2.0**-100, 2.0**100)
    range: float = between(1e-12, 1e12)
    entries: tuple[Entry, ...] = many(_MOST_ENTRIES)
    version: int = version_field()

    @cached_property
    def encoded(self) -> bytes:
        """The plan as it travels and is hashed."""
        return encode(self, pb.EncryptedPlan)

    @property
    def tag(self) -> bytes:
        """What names this attempt in a reply."""
        return labels.digest(labels.HE_ROUND, self.encoded)[:ROUND_TAG_BYTES]

    def round_id(self, metrics: tuple[str, ...], shared_input: bytes) -> bytes:
        """R, what the tags of this attempt are made for: a sum of devices with other metrics has other tags.

        Args:
            metrics: names of the last lanes.
            shared_input: digest of the model and all else that the devices were given, 32 bytes.
        """
        return labels.digest(labels.HE_ROUND, self.encoded, shared_input, *(name.encode() for name in metrics))

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedPlan:
        """From a peer's bytes; raises PeerError when they are no plan, or its arrays are not possible."""
        plan = decode_exactly(cls, data, pb.EncryptedPlan)
        names = {entry.name for entry in plan.entries}
        if len(names) < len(plan.entries) or sum(entry.size for entry in plan.entries) > _MOST_VALUES:
            raise PeerError(Refusal.MODEL, "the plan's arrays have one name twice, or too many values")
        if not {entry.dtype for entry in plan.entries} <= _DTYPES:
            raise PeerError(Refusal.MODEL, "an array of the plan does not hold real numbers")
        if bool(plan.entries) != (plan.kind == Kind.TRAIN):
            raise PeerError(Refusal.MODEL, "a plan to train names the arrays, one to evaluate does not")
        return plan


@dataclass(frozen=True, slots=True, repr=False)
class EncryptedUpload:
    """What a device sends: its ciphertexts with their tags one after the other."""

    round_tag: bytes = sized(ROUND_TAG_BYTES)
    metrics: tuple[str, ...] = sized(1, LONGEST_NAME, count=MOST_METRICS)
    ciphertexts: bytes = sized(0, _LARGEST_SUM)
    version: int = version_field()

    def to_bytes(self) -> bytes:
        """As it travels."""
        return encode(self, pb.EncryptedUpload)

    @classmethod
    def from_bytes(cls, data: bytes, limit: int) -> EncryptedUpload:
        """From a device's bytes, `limit` at most; raises PeerError when they are none."""
        return decode(cls, data, pb.EncryptedUpload, limit)


@dataclass(frozen=True, slots=True, repr=False)
class EncryptedSum:
    """The sum of a round: the global model, or the metrics of an evaluation. Who has the key opens it.

    Attributes:
        plan: the bytes of the `EncryptedPlan` that it was made under.
        alive: bitmap over the roster, whose ciphertexts are in it.
        metrics: names of the last lanes.
        ciphertexts: with their tags, one after the other.
        shared_input: digest of what its devices were given, which their tags are bound to.
        frozen: in a file, what training left alone, as safetensors; no secret, and nobody vouches for it.
    """

    plan: bytes = sized(1, LARGEST_MESSAGE)
    alive: bytes = sized(1, LARGEST_INDEX // 8 + 1)
    metrics: tuple[str, ...] = sized(1, LONGEST_NAME, count=MOST_METRICS)
    ciphertexts: bytes = sized(1, _LARGEST_SUM)
    shared_input: bytes = sized(DIGEST_BYTES)
    frozen: bytes = sized(0, _LARGEST_SUM, default=b"")
    version: int = version_field()

    def made_by(self) -> EncryptedPlan:
        """The plan that it was made under; raises PeerError, with the code of sums, where that is none."""
        try:
            return EncryptedPlan.from_bytes(self.plan)
        except PeerError:
            raise refused() from None

    @property
    def devices(self) -> tuple[int, ...]:
        """Indices of those whose ciphertexts are in it, rising."""
        return from_bitmap(self.alive)

    def to_bytes(self) -> bytes:
        """As it travels, and as the file that a run leaves."""
        return encode(self, pb.EncryptedSum)

    @classmethod
    def from_bytes(cls, data: bytes) -> EncryptedSum:
        """From a peer's bytes; raises PeerError when they are none."""
        return decode(cls, data, pb.EncryptedSum, _LARGEST_SUM)


def is_encrypted_model(data: bytes) -> bool:
    """Whether a file says to be an encrypted model, and not the metrics of an evaluation; who has the key finds out."""
    try:
        return EncryptedPlan.from_bytes(EncryptedSum.from_bytes(data).plan).kind == Kind.TRAIN
    except PeerError:
        return False


def pieces(ciphertexts: bytes, size: int) -> Iterator[bytes]:
    """The ciphertexts, each of so many bytes with its tag; the last one is shorter where the bytes do not divide."""
    return (ciphertexts[start : start + size] for start in range(0, len(ciphertexts), size))

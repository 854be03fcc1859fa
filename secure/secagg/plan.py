"""What all devices of a round must agree on before they train, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache

from propolis.protos import secagg_pb2 as pb
from propolis.secure import labels
from propolis.secure.codec.encoding import Encoding as Encoding
from propolis.secure.codec.quantize import Grid
from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.graph import NeighbourGraph, Sharing, sharing
from propolis.secure.secagg.addition import RingTotal
from propolis.secure.secagg.messages import SUITE, TAG_BYTES, from_bitmap
from propolis.secure.wire import between, decode_exactly, encode, sized, version_field

_MILLION = 1_000_000
LARGEST_ENCRYPTED_PLAN = 2**22


class Kind(IntEnum):
    """What a round is for."""

    TRAIN = 1
    EVALUATE = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """The terms of one attempt at one round; (run_id, round, attempt) names it and never comes twice.

    Attributes:
        encoding: see `Encoding`; None where the updates are encrypted.
        malicious: complete graph and a confirm exchange.
        run_id: see `propolis.secure.secagg.runs`.
        round: from 1, as the application counts.
        attempt: rises with every try within a round.
        kind: `Kind`.
        roster_number, roster_digest: the roster that the indices refer to.
        cohort: bitmap over that roster.
        corrupted_ppm, dropped_ppm: assumed shares in millionths, which decide the sparse graph.
        encrypted: what else the devices agree on where the updates are encrypted, else empty.
    """

    encoding: Encoding | None
    malicious: bool
    run_id: bytes = sized(16)
    round: int = between(0, 2**31)
    attempt: int = between(0, 2**31)
    kind: int = between(1, 2)
    roster_number: int = between(1, 2**62)
    roster_digest: bytes = sized(32)
    cohort: bytes = sized(1, 2**17)
    corrupted_ppm: int = between(0, _MILLION - 1)
    dropped_ppm: int = between(0, _MILLION - 1)
    version: int = version_field()
    suite: int = between(SUITE, SUITE, default=SUITE)
    encrypted: bytes = sized(0, LARGEST_ENCRYPTED_PLAN, default=b"")

    def to_bytes(self) -> bytes:
        """The plan as it travels and is hashed."""
        return encode(self, pb.Plan)


class Terms:
    """A plan's bytes and all that follows from them; both roles compute it for themselves.

    What takes time is computed when it is asked for: a device looks at the plan first.

    Raises:
        PeerError: the bytes are no plan; or, when asked for, what follows cannot be carried out.
    """

    def __init__(self, plan: bytes) -> None:
        self.bytes = plan
        self.plan = decode_exactly(Plan, plan, pb.Plan)
        if (self.plan.encoding is None) != bool(self.plan.encrypted):
            raise PeerError(Refusal.MALFORMED, "a plan says how updates are encoded, or how they are encrypted")
        self.digest = labels.digest(labels.PLAN, plan)
        self.tag = self.digest[:TAG_BYTES]

    @cached_property
    def cohort(self) -> tuple[int, ...]:
        """The devices' indices, rising."""
        return from_bitmap(self.plan.cohort)

    @cached_property
    def sharing(self) -> Sharing:
        """Degree and threshold."""
        plan = self.plan
        with _blaming_the_plan():
            return sharing(len(self.cohort), plan.corrupted_ppm / _MILLION, plan.dropped_ppm / _MILLION, plan.malicious)

    @property
    def encoding(self) -> Encoding:
        """How updates become vectors; raises PeerError where they are encrypted instead."""
        if self.plan.encoding is None:
            raise PeerError(Refusal.MODEL, "the round is one of encrypted updates")
        return self.plan.encoding

    @property
    def is_encrypted(self) -> bool:
        """Whether masks go onto ciphertexts."""
        return bool(self.plan.encrypted)

    @property
    def grid(self) -> Grid:
        """Where the coordinates of an update lie; raises as `encoding`."""
        return self.encoding.grid

    def place(self, index: int) -> int:
        """The place of a device in the cohort's order."""
        return self.cohort.index(index)

    def require_feasible(self) -> None:
        """Refuse a plan for which no graph is safe enough, or whose ring is too small for its devices.

        Raises:
            PeerError: it is one.
        """
        if not self.is_encrypted:
            with _blaming_the_plan():
                self.encoding.require_room(len(self.cohort))
                self.encoding.require_names(trains=self.plan.kind == Kind.TRAIN)
        self.sharing  # noqa: B018 (computed once, here)

    @property
    def kind(self) -> Kind:
        """What the round is for."""
        return Kind(self.plan.kind)

    @property
    def name(self) -> tuple[int, int]:
        """Round and attempt: of one run, a device takes part in rising ones only."""
        return self.plan.round, self.plan.attempt

    @cached_property
    def _graph(self) -> NeighbourGraph:
        plan = self.plan
        numbers = (plan.round.to_bytes(8, "big"), plan.attempt.to_bytes(8, "big"))
        seed = labels.digest(labels.GRAPH, plan.run_id, *numbers, plan.roster_digest, plan.cohort)
        return NeighbourGraph(self.cohort, self.sharing.degree, seed)

    def neighbours(self, index: int) -> tuple[int, ...]:
        """The neighbours of a device of the cohort, rising."""
        return self._graph.neighbours(index)


@contextmanager
def _blaming_the_plan() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise PeerError(Refusal.MALFORMED, f"the plan cannot be carried out: {error}") from None


@lru_cache(maxsize=8)
def terms_of(plan: bytes) -> Terms:
    """`Terms` of an accepted plan, remembered: the exchanges of a round ask again and again."""
    return Terms(plan)


def of_ring(terms: Terms) -> RingTotal:
    """An empty sum of vectors in the plan's ring, of whatever length."""
    return RingTotal(terms.grid.ring, 0)

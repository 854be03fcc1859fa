"""What a secure sum is over: vectors in the plan's ring, or whatever else masks hide and addition takes them out of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from propolis.secure.prg import VECTOR_STREAM, Mask, apply_masks
from propolis.secure.ring import Ring, Vector

T_co = TypeVar("T_co", covariant=True)


class Addend(Protocol):
    """What one device adds to the sum of a round."""

    def masked(self, masks: Sequence[Mask]) -> bytes:
        """As it travels, under these masks; asked for once, and what was in the clear may be gone afterwards."""


class Total(Protocol[T_co]):
    """The running sum of a round on the server."""

    @property
    def largest_addend(self) -> int:
        """Bytes that what a device adds may have."""

    def add(self, data: bytes) -> None:
        """Add what a device sent, or nothing of it; raises PeerError."""

    def without(self, masks: Sequence[Mask], threads: int) -> T_co:
        """What the sum is once these masks are taken away, with their signs; the total stays as it is."""

    def to_bytes(self) -> bytes:
        """All of it."""

    def restore(self, data: bytes) -> None:
        """Go on with what `to_bytes` gave; raises ValueError or PeerError when it is not of this round."""


@dataclass(frozen=True, slots=True, repr=False)
class RingVector:
    """(d,) a vector in a ring; masked in place."""

    vector: Vector
    ring: Ring

    def masked(self, masks: Sequence[Mask]) -> bytes:
        """See `Addend`."""
        apply_masks(self.vector, masks, self.ring, VECTOR_STREAM)
        return self.ring.pack(self.vector)


class RingTotal:
    """The sum of vectors in a ring.

    Args:
        ring: Z_2^w.
        dimension: d, the length of each.
    """

    def __init__(self, ring: Ring, dimension: int) -> None:
        self._ring, self._dimension = ring, dimension
        self._sum = ring.zeros(dimension)

    @property
    def largest_addend(self) -> int:
        """See `Total`."""
        return self._ring.packed_size(self._dimension)

    def add(self, data: bytes) -> None:
        """See `Total`."""
        self._sum += self._ring.unpack(data, self._dimension)

    def without(self, masks: Sequence[Mask], threads: int) -> Vector:
        """(d,) see `Total`."""
        vector = self._sum.copy()
        apply_masks(vector, masks, self._ring, VECTOR_STREAM, threads)
        return vector

    def to_bytes(self) -> bytes:
        """See `Total`."""
        return self._sum.tobytes()

    def restore(self, data: bytes) -> None:
        """See `Total`."""
        self._dimension = len(data) // self._ring.dtype.itemsize
        self._sum = self._ring.from_memory(data, self._dimension)

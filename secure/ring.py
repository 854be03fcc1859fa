"""Vectors over the integers modulo 2^w: what updates are added up in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import PeerError, Refusal, UsageError

Vector = NDArray[np.unsignedinteger[Any]]

# Values packed or unpacked at a time; a multiple of eight, so that every block but the last fills whole bytes.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Ring:
    """Z_2^w.

    A vector is x: (d,) of the smallest unsigned type with at least w bits. Sums and differences may be taken in
    that type, because 2^w divides its modulus; `reduce` brings the result back to [0, 2^w).

    Args:
        width: w in bits, 2..32 or 64.

    Raises:
        UsageError: another width.
    """

    width: int

    def __post_init__(self) -> None:
        if not (2 <= self.width <= 32 or self.width == 64):
            raise UsageError(f"the ring's width must be 2..32 or 64 bits, got {self.width}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a vector's entries, little-endian."""
        return np.dtype(f"<u{next(size for size in (1, 2, 4, 8) if 8 * size >= self.width)}")

    def zeros(self, count: int) -> Vector:
        """The vector of `count` zeros."""
        return np.zeros(count, self.dtype)

    def reduce(self, x: Vector) -> Vector:
        """X modulo 2^w, in place."""
        if 8 * self.dtype.itemsize != self.width:
            np.bitwise_and(x, self.dtype.type((1 << self.width) - 1), out=x)
        return x

    def embed(self, values: NDArray[Any]) -> Vector:
        """Signed integers as elements of the ring: v for v >= 0, 2^w + v below."""
        return self.reduce(values.astype(f"<i{self.dtype.itemsize}", casting="unsafe").view(self.dtype))

    def centre(self, x: Vector) -> NDArray[np.int64]:
        """The representatives in [-2^(w-1), 2^(w-1)): the inverse of `embed` for small enough values."""
        if self.width == 64:
            return x.view("<i8").astype(np.int64)
        signed = x.astype(np.int64)
        signed[signed >= 1 << (self.width - 1)] -= 1 << self.width
        return signed

    def packed_size(self, count: int) -> int:
        """Bytes of `count` packed elements: ceil(count * w / 8)."""
        return (count * self.width + 7) // 8

    def pack(self, x: Vector) -> bytes:
        """X with w bits per element, lowest bit first, the last byte filled up with zeros.

        >>> Ring(4).pack(np.array([1, 2, 15], np.uint8)).hex()
        '210f'
        """
        if 8 * self.dtype.itemsize == self.width:
            return x.astype(self.dtype, copy=False).tobytes()
        return b"".join(self._pack_block(x[start : start + _BLOCK]) for start in range(0, len(x), _BLOCK))

    def unpack(self, data: bytes, count: int) -> Vector:
        """The inverse of `pack`.

        Raises:
            PeerError: the data is not exactly `count` packed elements.
        """
        if len(data) != self.packed_size(count):
            raise PeerError(Refusal.MALFORMED, f"expected {self.packed_size(count)} packed bytes, got {len(data)}")
        if 8 * self.dtype.itemsize == self.width:
            return np.frombuffer(data, self.dtype)
        x = np.empty(count, self.dtype)
        for start in range(0, count, _BLOCK):
            block = x[start : start + _BLOCK]
            first = self.packed_size(start)
            self._unpack_block(np.frombuffer(data, np.uint8, self.packed_size(len(block)), first), block)
        if data and data[-1] >> ((count * self.width - 1) % 8 + 1):
            raise PeerError(Refusal.MALFORMED, "the bits after the last packed element are not zero")
        return x

    def from_memory(self, data: bytes, count: int) -> Vector:
        """A writable vector from the bytes of one; raises PeerError when the length is another one's."""
        if len(data) != count * self.dtype.itemsize:
            raise PeerError(Refusal.MALFORMED, f"expected a vector of {count} elements")
        return np.frombuffer(data, self.dtype).copy()

    def _pack_block(self, x: Vector) -> bytes:
        if self.width < 8:
            return _pack_octets(x, self.width)[: self.packed_size(len(x))]
        as_bytes = np.ascontiguousarray(x, self.dtype).view(np.uint8).reshape(len(x), -1)
        bits = np.unpackbits(as_bytes, axis=1, count=self.width, bitorder="little")
        return np.packbits(bits, bitorder="little").tobytes()

    def _unpack_block(self, data: NDArray[np.uint8], out: Vector) -> None:
        if self.width < 8:
            _unpack_octets(data, self.width, out)
            return
        bits = np.unpackbits(data, count=len(out) * self.width, bitorder="little").reshape(len(out), self.width)
        whole = np.zeros((len(out), self.dtype.itemsize), np.uint8)
        as_bytes = np.packbits(bits, axis=1, bitorder="little")
        whole[:, : as_bytes.shape[1]] = as_bytes
        out[:] = whole.view(self.dtype)[:, 0]


def _pack_octets(x: Vector, width: int) -> bytes:
    """Eight elements of fewer than eight bits at a time, in words of 64 bits, whose lanes are pushed together in pairs.

    So eight elements of five bits become four lanes of ten bits, two of twenty, and one of forty, which is five bytes.
    """
    words = np.zeros(-(-len(x) // 8), "<u8")
    words.view(np.uint8)[: len(x)] = x
    for lane in (8, 16, 32):
        low = _low_lanes(lane, width)
        upper = words >> np.uint64(lane)
        upper &= low
        upper <<= np.uint64(lane * width // 8)
        words &= low
        words |= upper
    return words.view(np.uint8).reshape(-1, 8)[:, :width].tobytes()


def _unpack_octets(data: NDArray[np.uint8], width: int, out: Vector) -> None:
    """The inverse of `_pack_octets`."""
    words = np.zeros(-(-len(out) // 8), "<u8")
    octets = words.view(np.uint8).reshape(-1, 8)
    whole = len(data) // width
    octets[:whole, :width] = data[: whole * width].reshape(-1, width)
    octets[whole:, : len(data) - whole * width] = data[whole * width :]
    for lane in (32, 16, 8):
        low = _low_lanes(lane, width)
        upper = words >> np.uint64(lane * width // 8)
        upper &= low
        upper <<= np.uint64(lane)
        words &= low
        words |= upper
    out[:] = words.view(np.uint8)[: len(out)]


def _low_lanes(lane: int, width: int) -> np.uint64:
    """The bits in use of every other lane of a word; a lane of `lane` bits holds lane / 8 elements."""
    used = (1 << lane * width // 8) - 1
    return np.uint64(sum(used << at for at in range(0, 64, 2 * lane)))

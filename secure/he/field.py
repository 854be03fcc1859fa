"""Arithmetic modulo m < 2^60: uniform elements from a seed, and their sums."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import UsageError
from propolis.secure.prg import key_stream

Elements = NDArray[np.uint64]

LARGEST_MODULUS = 2**60
_WORD = 8


class UniformElements:
    """The elements of a seed, uniform modulo m: words of its key stream, without those that would favour small ones.

    A little-endian word of 64 bits is taken when it is below the largest multiple of m, modulo m; otherwise it is
    left out. So the elements are exactly uniform when the words are.

    Args:
        seed: 32 bytes, the AES key of the stream.
        modulus: m < 2^60.
        stream: 0..255, as in `propolis.secure.prg.key_stream`.
    """

    def __init__(self, seed: bytes, modulus: int, stream: int = 0) -> None:
        require_modulus(modulus)
        self._cipher = key_stream(seed, stream, 0)
        self._modulus, self._limit = np.uint64(modulus), np.uint64(2**64 // modulus * modulus - 1)
        self._left = np.empty(0, np.uint64)

    def take(self, count: int) -> Elements:
        """The next `count` elements."""
        parts, missing = [self._left], count - len(self._left)
        while missing > 0:
            words = np.frombuffer(self._cipher.update(bytes(_WORD * missing)), "<u8")
            accepted = words[words <= self._limit] % self._modulus
            parts.append(accepted)
            missing -= len(accepted)
        elements = np.concatenate(parts)
        self._left = elements[count:]
        return elements[:count]


def add(x: Elements, y: Elements, modulus: int) -> Elements:
    """X + y modulo m, for elements of [0, m)."""
    return (x + y) % np.uint64(modulus)


def subtract(x: Elements, y: Elements, modulus: int) -> Elements:
    """X - y modulo m, for elements of [0, m)."""
    return (x + (np.uint64(modulus) - y)) % np.uint64(modulus)


def require_modulus(modulus: int) -> None:
    """Refuse a modulus that two elements could overflow with; raises UsageError."""
    if not 2 <= modulus < LARGEST_MODULUS:
        raise UsageError("a modulus of 2 to 2^60 is needed")

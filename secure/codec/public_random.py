"""Randomness that all devices of a round share and that is no secret: AES-256-CTR, the same bits everywhere.

numpy's generators may change from version to version; a device and a server must not differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from propolis.secure import labels
from propolis.secure.prg import key_stream

_STREAM = 0


def derive_seed(seed: bytes, use: bytes) -> bytes:
    """The seed of one use, 32 bytes, so that no two uses share their randomness."""
    return labels.digest(labels.CODEC, seed, use)


def random_bits(seed: bytes, count: int) -> NDArray[np.bool_]:
    """(count,) fair coins."""
    packed = np.frombuffer(_stream(seed, (count + 7) // 8), np.uint8)
    return np.unpackbits(packed, count=count).view(np.bool_)


def random_words(seed: bytes, count: int) -> NDArray[np.uint32]:
    """(count,) uniform in [0, 2^32)."""
    return np.frombuffer(_stream(seed, 4 * count), "<u4")


def random_below(seed: bytes, count: int, bound: int) -> NDArray[np.uint32]:
    """(count,) in [0, bound), uniform up to bound / 2^32."""
    return (random_words(seed, count).astype(np.uint64) * np.uint64(bound) >> np.uint64(32)).astype(np.uint32)


def _stream(seed: bytes, size: int) -> bytes:
    return key_stream(seed, _STREAM, 0).update(bytes(size))

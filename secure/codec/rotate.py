"""The randomized Hadamard rotation: what is large in one coordinate becomes small in many.

Signs drawn from a seed that all devices share, then the Walsh-Hadamard transform of each block, divided by the root
of the block's length. It is linear and keeps lengths, so the sum of rotated vectors is the rotated sum (Suresh et al.,
ICML 2017, section 3).
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from propolis.secure.codec.public_random import random_bits

BLOCK = 1024
_GOLDEN = 0.6180339887498949

Float = TypeVar("Float", np.float32, np.float64)


def padded_size(count: int) -> int:
    """Length of a rotated vector: whole blocks, and for what is left over the next power of two.

    >>> [padded_size(d) for d in (0, 1, 3, 1024, 1500)]
    [0, 1, 4, 1024, 1536]
    """
    whole, rest = divmod(count, BLOCK)
    return whole * BLOCK + (1 << (rest - 1).bit_length() if rest else 0)


def rotate(x: NDArray[np.float32], seed: bytes) -> NDArray[np.float32]:
    """The rotation of x.

    Args:
        x: (k,).
        seed: 32 bytes, the round's.

    Returns:
        (padded_size(k),) of the same length in L2.
    """
    padded = np.zeros(padded_size(len(x)), np.float32)
    padded[: len(x)] = x[_spread(len(x))]
    padded *= _signs(len(padded), seed)
    return _transform(padded)


def unrotate(y: NDArray[np.float64], count: int, seed: bytes) -> NDArray[np.float64]:
    """The inverse of `rotate`: (padded_size(count),) to (count,), in double precision."""
    transformed = _transform(y.copy())
    transformed *= _signs(len(y), seed)
    x = np.empty(count)
    x[_spread(count)] = transformed[:count]
    return x


@lru_cache(maxsize=4)
def _spread(count: int) -> NDArray[np.int64]:
    """An order of the coordinates of which every piece comes evenly from the whole vector: golden steps.

    A layer's changes may be many times larger than another's. So each block gets its share of every layer, and all
    coordinates have about one size after the rotation, for which the grid is chosen.
    """
    stride = round(count * _GOLDEN)
    while gcd(stride, count) > 1:
        stride += 1
    return np.arange(count, dtype=np.int64) * stride % max(1, count)


def _transform(x: NDArray[Float]) -> NDArray[Float]:
    """Each block of x times its Hadamard matrix, which is its own inverse; in place where that can be."""
    whole = len(x) - len(x) % BLOCK
    for start, end in ((0, whole), (whole, len(x))):
        if end > start:
            blocks = x[start:end].reshape(-1, min(BLOCK, end - start))
            x[start:end] = _transform_blocks(blocks).ravel()
    return x


def _transform_blocks(blocks: NDArray[Float]) -> NDArray[Float]:
    """(b, m) to (b, m), m a power of two: H_m = H_r x H_c, so two small matrix products do (r c = m)."""
    size = blocks.shape[1]
    columns = 1 << (size.bit_length() - 1) // 2
    rows = size // columns
    left, right = _hadamard(rows).astype(blocks.dtype), _hadamard(columns).astype(blocks.dtype)
    squares = blocks.reshape(-1, rows, columns)
    products: NDArray[Float] = np.matmul(left, np.matmul(squares, right))
    return products.reshape(blocks.shape)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> NDArray[np.float64]:
    """The orthonormal Hadamard matrix of a power of two (Sylvester's construction)."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix *= size**-0.5
    return matrix


def _signs(count: int, seed: bytes) -> NDArray[np.float32]:
    return np.where(random_bits(seed, count), np.float32(1), np.float32(-1))

"""The global model's way to the devices: each version is a quantized step from the one before it.

The server's own model M keeps its precision; the devices train from B, which follows it: B += Q(M - B), where Q rounds
to multiples of a step and drops what is small. What Q lost is still in M - B and goes out with a later step, so
nothing is lost and B does not drift (error feedback on the server's side). Each array has a step of its own. Symbols
are few and compress well, and they are the same for all devices: who missed some gets those as well.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.wire import between, sized

Values = NDArray[np.float32]

# Bytes of all the values, compressed or not, and a letter before them.
LARGEST_VALUES = 2**30 + 64
# A value this part of a step goes to zero: half would be nearest, but zeros are what compresses.
_DEAD_ZONE = 0.6
# What a value is that is as good as zero but not pruned: zero is what a pruned value is.
NOT_PRUNED = np.float32(1e-30)
# Step of the first version in units of each array's root mean square, at most: fine enough for a model to begin with.
FIRST_STEP = 1 / 4
_LARGEST_SYMBOL = {1: 2**7 - 1, 2: 2**15 - 1}

_METHODS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"b", lambda data: bz2.compress(data, 9)),
    (b"z", lambda data: _deflated(data)),
)


@dataclass(frozen=True, slots=True, repr=False)
class Delta:
    """One step; see protos/update.proto."""

    steps: tuple[float, ...] = between(0, 3.4e38, count=2**16)
    symbol_bytes: int = between(1, 2)
    symbols: bytes = sized(1, LARGEST_VALUES)
    zeros: bytes = sized(0, LARGEST_VALUES)


def step_towards(
    values: Values, target: Values, steps: Sequence[float], sizes: Sequence[int], pruned: NDArray[np.bool_] | None
) -> tuple[Delta, Values]:
    """The next version.

    Args:
        values: (d,) what the devices have.
        target: (d,) finite; what they should have.
        steps: of each array's grid; made coarser where a symbol would not hold what is lacking.
        sizes: of each array; they add up to d.
        pruned: (d,) where the target is zero for good; None for nowhere.

    Returns:
        The delta, and the values that it leads to.
    """
    lacking = target - values
    if pruned is not None:
        lacking[pruned] = 0
    fitting = tuple(
        float(np.float32(max(step, float(np.abs(part).max(initial=0.0)) / _LARGEST_SYMBOL[2])))
        for step, part in zip(steps, parts(lacking, sizes), strict=True)
    )
    each = _repeated(fitting, sizes)
    magnitudes = np.abs(np.divide(lacking, each, out=np.zeros_like(lacking), where=each > 0))
    symbols = np.copysign(np.floor(magnitudes + np.float32(1 - _DEAD_ZONE)), lacking).astype(np.int16)
    newly = b""
    if pruned is not None and np.any(fresh := pruned & (values != 0)):
        newly = compress(np.packbits(fresh).tobytes())
    width = 1 if np.abs(symbols).max(initial=0) <= _LARGEST_SYMBOL[1] else 2
    planes = symbols.astype(f"<i{width}").view(np.uint8).reshape(-1, width).T
    delta = Delta(fitting, width, compress(planes.tobytes()), newly)
    return delta, apply(values, delta, sizes)


def apply(values: Values, delta: Delta, sizes: Sequence[int]) -> Values:
    """The values after a step; the same bits on every machine.

    Raises:
        PeerError: the delta is not one for arrays of these sizes, or leads to something infinite.
    """
    if len(delta.steps) != len(sizes):
        raise PeerError(Refusal.MALFORMED, f"{len(delta.steps)} steps for {len(sizes)} arrays")
    width, count = delta.symbol_bytes, len(values)
    planes = np.frombuffer(decompress(delta.symbols, width * count), np.uint8).reshape(width, count)
    symbols = np.ascontiguousarray(planes.T).view(f"<i{width}")[:, 0] if count else np.zeros(0, np.int8)
    with np.errstate(over="ignore", invalid="ignore"):
        after: Values = values + symbols.astype(np.float32) * _repeated(delta.steps, sizes)
    after[(after == 0) & (symbols != 0)] = NOT_PRUNED
    if delta.zeros:
        packed = np.frombuffer(decompress(delta.zeros, (count + 7) // 8), np.uint8)
        after[np.unpackbits(packed, count=count).view(np.bool_)] = 0
    if not np.isfinite(after).all():
        raise PeerError(Refusal.MODEL, "a step of the model leads to something infinite")
    return after


def parts(values: Values, sizes: Sequence[int]) -> list[Values]:
    """The values array by array."""
    return np.split(values, np.cumsum(sizes)[:-1]) if sizes else []


def _repeated(steps: Sequence[float], sizes: Sequence[int]) -> Values:
    return np.repeat(np.array(steps, np.float32), sizes)


def values_digest(values: Values) -> bytes:
    """32 bytes that stand for a version."""
    return labels.digest(labels.BROADCAST, np.ascontiguousarray(values, "<f4").view(np.uint8).data)


def compress(data: bytes) -> bytes:
    """The shorter of two of Python's own compressions, and a letter that says which."""
    return min((letter + method(data) for letter, method in _METHODS), key=len)


def decompress(data: bytes, size: int) -> bytes:
    """The inverse of `compress`.

    Raises:
        PeerError: not `size` bytes come out; no more than that are ever made.
    """
    try:
        out = _inflate(data[:1], data[1:], size)
    except (OSError, ValueError, EOFError, zlib.error):
        out = None
    if out is None or len(out) != size:
        raise PeerError(Refusal.MALFORMED, f"expected {size} compressed bytes")
    return out


def _inflate(letter: bytes, data: bytes, size: int) -> bytes | None:
    if letter == b"b":
        return bz2.BZ2Decompressor().decompress(data, size + 1)
    if letter == b"r":
        return data
    if letter == b"z":
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    return None


def _deflated(data: bytes) -> bytes:
    deflating = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return deflating.compress(data) + deflating.flush()

"""Seeds to masks: AES-256 in counter mode (NIST SP 800-38A; RFC 3686 vectors), as a ring vector.

The key stream of a seed is cut into little-endian integers of the ring's own type. Two streams of one seed start
2^120 blocks apart, so they never meet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from propolis.secure.ring import Ring, Vector

SEED_BYTES = 32
VECTOR_STREAM, LANE_STREAM = 0, 1

_BLOCK_BYTES = 16
# A piece of a vector that stays in the processor's second cache while every mask is added to it.
_CHUNK_BYTES = 1 << 17
_ZEROS = memoryview(bytes(_CHUNK_BYTES))
# Ciphers that are kept from piece to piece: setting one up costs as much as a few kilobytes of its stream.
_OPEN_STREAMS = 64


@dataclass(frozen=True, slots=True, repr=False)
class Mask:
    """A mask to add (sign 1) or take away (sign -1), as the seed that it grows from."""

    seed: bytes
    sign: int


def key_stream(seed: bytes, stream: int, offset: int) -> CipherContext:
    """A seed's key stream: encrypting zeros gives it, piece by piece.

    Args:
        seed: 32 bytes, the AES key.
        stream: 0..255, the highest byte of the counter.
        offset: where to start in bytes, a multiple of 16.
    """
    counter = (stream << 120) + offset // _BLOCK_BYTES
    return Cipher(algorithms.AES(seed), modes.CTR(counter.to_bytes(_BLOCK_BYTES, "big"))).encryptor()


def apply_masks(x: Vector, masks: Sequence[Mask], ring: Ring, stream: int, threads: int = 1) -> None:
    """Add masks to a vector in place, and reduce it.

    Args:
        x: (d,) of the ring's type.
        masks: which ones; each is as long as x.
        ring: Z_2^w.
        stream: which stream of the seeds.
        threads: parts of x that are worked on at once; the cipher runs without Python's lock. 0 means one per
            processor.
    """
    step = _CHUNK_BYTES // ring.dtype.itemsize
    threads = max(1, min(threads or os.cpu_count() or 1, -(-len(x) // step)))
    share = -(-len(x) // (threads * step)) * step or step
    apply = partial(_apply_to_part, x, masks, ring, stream, share)
    if threads == 1:
        apply(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(apply, range(0, len(x), share)))


def _apply_to_part(x: Vector, masks: Sequence[Mask], ring: Ring, stream: int, share: int, start: int) -> None:
    """Every mask on x[start : start + share], a piece that stays in the cache at a time."""
    part, size = x[start : start + share], ring.dtype.itemsize
    step = _CHUNK_BYTES // size
    buffer = np.empty(min(_CHUNK_BYTES, part.nbytes), np.uint8)
    for first in range(0, len(masks), _OPEN_STREAMS):
        opened = [
            (key_stream(each.seed, stream, start * size), np.add if each.sign > 0 else np.subtract)
            for each in masks[first : first + _OPEN_STREAMS]
        ]
        for at in range(0, len(part), step):
            chunk = part[at : at + step]
            out, zeros = buffer[: chunk.nbytes], _ZEROS[: chunk.nbytes]
            mask = out.view(ring.dtype)
            for cipher, combine in opened:
                cipher.update_into(zeros, out.data)
                combine(chunk, mask, out=chunk)
    ring.reduce(part)

"""The key stream is AES-256-CTR, and masks go on and come off exactly. The RFC's vectors are in test_vectors.py."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.prg import LANE_STREAM, VECTOR_STREAM, Mask, apply_masks, key_stream
from propolis.secure.ring import Ring, Vector

SEED = bytes(range(32))
RINGS = [Ring(width) for width in (2, 7, 8, 13, 16, 20, 31, 32, 64)]
every_ring = pytest.mark.parametrize("ring", RINGS, ids=lambda ring: str(ring.width))


def stream_bytes(seed: bytes, stream: int, offset: int, count: int) -> bytes:
    return key_stream(seed, stream, offset).update(bytes(count))


def encrypted_counters(seed: bytes, first: int, blocks: int) -> bytes:
    """NIST SP 800-38A, section 6.5: the cipher applied to one counter block after the other."""
    counters = b"".join((first + i).to_bytes(16, "big") for i in range(blocks))
    return Cipher(algorithms.AES(seed), modes.ECB()).encryptor().update(counters)  # noqa: S305


def random_vector(ring: Ring, count: int) -> Vector:
    drawn = np.random.default_rng(1).integers(0, 2**64, count, np.uint64, endpoint=False)
    return ring.reduce(drawn.astype(ring.dtype))


@pytest.mark.parametrize("stream", [0, 1, 255])
@pytest.mark.parametrize("offset", [0, 16, 1 << 17, 1 << 40])
def test_the_key_stream_is_the_encrypted_counter(stream: int, offset: int) -> None:
    expected = encrypted_counters(SEED, (stream << 120) + offset // 16, 5)
    assert stream_bytes(SEED, stream, offset, 80) == expected
    assert stream_bytes(SEED, stream, offset, 71) == expected[:71]


@given(st.binary(min_size=32, max_size=32), st.integers(0, 255), st.integers(0, 64), st.integers(0, 200))
def test_a_piece_of_the_stream_is_the_stream_from_there(seed: bytes, stream: int, block: int, count: int) -> None:
    whole = stream_bytes(seed, stream, 0, 16 * block + count)
    assert stream_bytes(seed, stream, 16 * block, count) == whole[16 * block :]


def test_streams_and_seeds_differ() -> None:
    streams = [stream_bytes(SEED, stream, 0, 1 << 12) for stream in (VECTOR_STREAM, LANE_STREAM)]
    streams.append(stream_bytes(SEED[::-1], VECTOR_STREAM, 0, 1 << 12))
    blocks = [stream[i : i + 16] for stream in streams for i in range(0, len(stream), 16)]
    assert len(set(blocks)) == len(blocks)


@every_ring
@pytest.mark.parametrize("count", [100, 150_001])
def test_a_mask_is_the_key_stream_in_little_endian_elements(ring: Ring, count: int) -> None:
    x, size = random_vector(ring, count), ring.dtype.itemsize
    stream = encrypted_counters(SEED, LANE_STREAM << 120, -(-count * size // 16))[: count * size]
    mask = np.frombuffer(stream, f"<u{size}").astype(object)  # Python's integers, which do not wrap around
    for sign in (1, -1):
        masked = x.copy()
        apply_masks(masked, [Mask(SEED, sign)], ring, LANE_STREAM)
        np.testing.assert_array_equal(masked, (x.astype(object) + sign * mask) % 2**ring.width)


@every_ring
@pytest.mark.parametrize("count", [0, 1, 100_003])
def test_opposite_masks_cancel(ring: Ring, count: int) -> None:
    x = random_vector(ring, count)
    masked = x.copy()
    apply_masks(masked, [Mask(SEED, 1), Mask(SEED[::-1], -1)], ring, VECTOR_STREAM)
    assert count < 100 or np.count_nonzero(masked != x) > count / 2
    apply_masks(masked, [Mask(SEED[::-1], 1)], ring, VECTOR_STREAM)
    apply_masks(masked, [Mask(SEED, -1)], ring, VECTOR_STREAM)
    np.testing.assert_array_equal(masked, x)


@every_ring
def test_threads_change_nothing(ring: Ring) -> None:
    x = random_vector(ring, 300_000)
    masks = [Mask(SEED, 1), Mask(SEED[::-1], -1)]
    results = []
    for threads in (1, 2, 0):
        results.append(x.copy())
        apply_masks(results[-1], masks, ring, VECTOR_STREAM, threads)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@given(st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.sampled_from([1, -1])), max_size=5))
@settings(max_examples=30)
def test_masks_add_up_in_any_order(drawn: list[tuple[bytes, int]]) -> None:
    ring, masks = Ring(13), [Mask(*each) for each in drawn]
    together, apart = ring.zeros(50), ring.zeros(50)
    apply_masks(together, masks, ring, VECTOR_STREAM)
    for mask in reversed(masks):
        apply_masks(apart, [mask], ring, VECTOR_STREAM)
    np.testing.assert_array_equal(together, apart)


@every_ring
def test_a_masked_constant_looks_uniform(ring: Ring) -> None:
    count, bins = 1 << 18, 2 ** min(ring.width, 8)
    x = np.full(count, 1, ring.dtype)
    apply_masks(x, [Mask(SEED, 1)], ring, VECTOR_STREAM)
    for piece in (x >> ring.dtype.type(ring.width - min(ring.width, 8)), x & ring.dtype.type(bins - 1)):
        observed = np.bincount(piece.astype(np.int64), minlength=bins)
        assert len(observed) == bins
        chi_square = float(((observed - count / bins) ** 2 / (count / bins)).sum())
        degrees = bins - 1  # of freedom; chi-square has this mean and twice this variance
        assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


def test_a_mask_does_not_show_its_seed() -> None:
    assert "seed" not in repr(Mask(SEED, 1))

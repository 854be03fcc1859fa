"""Packing is exact and strict at every width; signed integers survive the ring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.ring import Ring, Vector

WIDTHS = [*range(2, 33), 64]
every_width = pytest.mark.parametrize("ring", [Ring(width) for width in WIDTHS], ids=lambda ring: str(ring.width))


def elements(data: st.DataObject, ring: Ring) -> Vector:
    values = data.draw(st.lists(st.integers(0, 2**ring.width - 1), max_size=30))
    return np.array(values, ring.dtype)


def bits_lowest_first(x: Vector, ring: Ring) -> bytes:
    """`pack` in another way: the elements as the digits of one large number."""
    digits = "".join(f"{int(value):0{ring.width}b}" for value in reversed(x))
    return int(digits or "0", 2).to_bytes(ring.packed_size(len(x)), "little")


@every_width
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_what_is_packed_is_unpacked(ring: Ring, data: st.DataObject) -> None:
    x = elements(data, ring)
    packed = ring.pack(x)
    assert packed == bits_lowest_first(x, ring)
    assert len(packed) == -(-len(x) * ring.width // 8)
    unpacked = ring.unpack(packed, len(x))
    assert unpacked.dtype == ring.dtype
    np.testing.assert_array_equal(unpacked, x)


@pytest.mark.parametrize(
    "ring", [Ring(width) for width in (3, 4, 5, 7, 13, 17, 31, 32)], ids=lambda ring: str(ring.width)
)
def test_long_vectors_are_packed_block_by_block_without_a_seam(ring: Ring) -> None:
    x = ring.reduce(np.random.default_rng(0).integers(0, 2**32, 2 * 65536 + 5, np.uint64).astype(ring.dtype))
    packed = ring.pack(x)
    assert packed == bits_lowest_first(x, ring)
    np.testing.assert_array_equal(ring.unpack(packed, len(x)), x)


@pytest.mark.parametrize("width", range(2, 8))
def test_bits_beyond_the_ring_do_not_reach_a_neighbour(width: int) -> None:
    ring, x = Ring(width), np.random.default_rng(0).integers(0, 256, 101).astype(np.uint8)
    assert ring.pack(x) == ring.pack(ring.reduce(x.copy()))


@every_width
@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused(ring: Ring, change: int) -> None:
    size = ring.packed_size(11)
    with pytest.raises(PeerError, match=f"expected {size} packed bytes, got {size + change}") as caught:
        ring.unpack(bytes(size + change), 11)
    assert caught.value.refusal is Refusal.MALFORMED
    with pytest.raises(PeerError):
        ring.unpack(b"\0", 0)
    assert len(ring.unpack(b"", 0)) == 0


@pytest.mark.parametrize("width", [width for width in WIDTHS if width % 8])
def test_every_padding_bit_must_be_zero(width: int) -> None:
    ring = Ring(width)
    for count in range(1, 9):
        packed = ring.pack(ring.zeros(count))
        for bit in range(count * width, 8 * len(packed)):
            forged = bytearray(packed)
            forged[bit // 8] |= 1 << bit % 8
            with pytest.raises(PeerError, match="not zero"):
                ring.unpack(bytes(forged), count)
        last = bytearray(packed)
        last[(count * width - 1) // 8] |= 1 << (count * width - 1) % 8
        assert ring.unpack(bytes(last), count)[-1] == 2 ** (width - 1)


@every_width
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_centre_undoes_embed(ring: Ring, data: st.DataObject) -> None:
    half = 2 ** (ring.width - 1)
    edges = [-half, -1, 0, 1, half - 1]
    values = np.array(data.draw(st.lists(st.integers(-half, half - 1))) + edges, np.int64)
    embedded = ring.embed(values)
    assert [int(each) for each in embedded] == [int(value) % 2**ring.width for value in values]
    np.testing.assert_array_equal(ring.centre(embedded), values)


@every_width
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_sums_are_taken_modulo_the_ring(ring: Ring, data: st.DataObject) -> None:
    x = elements(data, ring)
    total = ring.zeros(len(x))
    for _ in range(5):
        total += x
    assert ring.reduce(total) is total
    assert [int(each) for each in total] == [5 * int(value) % 2**ring.width for value in x]


def test_a_vector_from_memory_can_be_written_to_and_has_its_length() -> None:
    ring = Ring(17)
    x = np.arange(5, dtype=ring.dtype)
    copy = ring.from_memory(x.tobytes(), 5)
    copy += 1
    np.testing.assert_array_equal(copy, x + 1)
    with pytest.raises(PeerError, match="vector of 5 elements"):
        ring.from_memory(x.tobytes()[:-1], 5)


@pytest.mark.parametrize("width", [-1, 0, 1, 33, 63, 65])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(UsageError, match=f"2..32 or 64 bits, got {width}"):
        Ring(width)

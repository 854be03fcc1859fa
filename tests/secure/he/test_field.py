"""Elements modulo m are uniform, the same everywhere, and added without overflow."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import UsageError
from propolis.secure.he.field import LARGEST_MODULUS, UniformElements, add, subtract
from propolis.secure.he.parameters import choose

SEED = bytes(range(32))
# The first leaves out one word in 17, which is as many as can be; the others hardly any.
MODULI = [2**64 // 17 + 2, 2**59 - 55, choose(1000, 16).plain_modulus, 2**40 + 15]
every_modulus = pytest.mark.parametrize("modulus", MODULI)


def by_the_definition(seed: bytes, modulus: int, words: int) -> list[int]:
    """Words of AES-256-CTR with the counter from zero, in Python's integers."""
    counters = b"".join(i.to_bytes(16, "big") for i in range(words // 2))
    stream = Cipher(algorithms.AES(seed), modes.ECB()).encryptor().update(counters)  # noqa: S305
    taken = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, len(stream), 8)]
    return [word % modulus for word in taken if word < 2**64 // modulus * modulus]


@every_modulus
def test_elements_are_those_of_the_definition(modulus: int) -> None:
    expected = by_the_definition(SEED, modulus, 10_000)
    assert UniformElements(SEED, modulus).take(len(expected)).tolist() == expected


def test_words_that_would_favour_small_elements_are_left_out() -> None:
    share = len(by_the_definition(SEED, MODULI[0], 30_000)) / 30_000
    assert share == pytest.approx(16 / 17, abs=0.005)


# The first elements of SEED: what every device must draw.
VECTORS = {
    2**59 - 55: [44834969087940232, 33547050739758873, 405246221892346868, 375701234257754151],
    4503599627542529: [4302571867530217, 2021852994636706, 4425854424493975, 1902465017582291],
    65537: [21374, 14197, 33574, 18972],
}


@pytest.mark.parametrize("modulus", VECTORS)
def test_vectors(modulus: int) -> None:
    assert UniformElements(SEED, modulus).take(4).tolist() == VECTORS[modulus]


@given(st.lists(st.integers(0, 300), max_size=6), st.sampled_from(MODULI))
def test_pieces_are_the_whole(sizes: list[int], modulus: int) -> None:
    whole, pieces = UniformElements(SEED, modulus).take(sum(sizes)), UniformElements(SEED, modulus)
    np.testing.assert_array_equal(np.concatenate([pieces.take(0), *(pieces.take(size) for size in sizes)]), whole)


@every_modulus
def test_elements_look_uniform(modulus: int) -> None:
    count, bins = 1 << 17, 256
    elements = UniformElements(SEED, modulus).take(count)
    assert int(elements.max()) < modulus
    observed = np.bincount((elements / modulus * bins).astype(np.int64), minlength=bins)
    chi_square = float(((observed - count / bins) ** 2 / (count / bins)).sum())
    assert abs(chi_square - (bins - 1)) < 4 * (2 * (bins - 1)) ** 0.5


def test_seeds_and_streams_differ() -> None:
    taken = [UniformElements(*each).take(100).tolist() for each in ((SEED, 97), (SEED[::-1], 97), (SEED, 97, 1))]
    assert taken[0] != taken[1]
    assert taken[0] != taken[2]


elements = st.lists(st.integers(0, LARGEST_MODULUS - 2), min_size=1, max_size=40)


@given(elements, st.sampled_from([*MODULI, LARGEST_MODULUS - 1]))
@settings(max_examples=200)
def test_arithmetic_is_that_of_pythons_integers(drawn: list[int], modulus: int) -> None:
    x = [each % modulus for each in drawn]
    y = [(each * 7 + 3) % modulus for each in reversed(drawn)]
    as_arrays = np.array(x, np.uint64), np.array(y, np.uint64)
    assert add(*as_arrays, modulus).tolist() == [(a + b) % modulus for a, b in zip(x, y, strict=True)]
    assert subtract(*as_arrays, modulus).tolist() == [(a - b) % modulus for a, b in zip(x, y, strict=True)]


def test_a_modulus_that_sums_could_overflow_with_is_refused() -> None:
    with pytest.raises(UsageError, match="2 to 2\\^60"):
        UniformElements(SEED, LARGEST_MODULUS)

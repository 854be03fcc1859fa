"""Public randomness: the same bits on every machine, and uniform ones.

The expected words are those of AES-256 in ECB mode over the counters 0, 1, ... as blocks of 16 bytes, the seeds those
of SHA-256 over the label, the seed and the use, each after its length in eight bytes.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.codec.public_random import derive_seed, random_below, random_bits, random_words

SEED = bytes(range(32))
STREAM = "f29000b62a499fd0a9f39a6add2e7780f05d76ae4ab99fe5a6f69b3148c2363d"
WORDS = [3053490418, 3500099882, 1788539817, 2155294429, 2926992880, 3852450122, 832304806, 1026998856]
DERIVED = {
    b"support": "344d06dde9ade06adb0fc65134902793a7957a59fe3419cea05beda23b31df37",
    b"rotation": "ac782c386773f79ee1c6b59ca08598ad2edf56937ad1823d1c6f68a3ef68c8d3",
}
seeds = st.binary(min_size=32, max_size=32)


def test_the_words_are_the_ciphers() -> None:
    assert random_words(SEED, 8).tolist() == WORDS
    assert random_words(SEED, 8).dtype == np.uint32


def test_the_bits_are_the_ciphers_highest_first() -> None:
    assert np.packbits(random_bits(SEED, 256)).tobytes().hex() == STREAM
    assert random_bits(SEED, 11).tolist() == [bit == "1" for bit in f"{int(STREAM[:4], 16):016b}"[:11]]


def test_the_numbers_below_a_bound_are_the_words_scaled_down() -> None:
    assert random_below(SEED, 8, 10).tolist() == [7, 8, 4, 5, 6, 8, 1, 2]
    assert random_below(SEED, 8, 3).tolist() == [2, 2, 1, 1, 2, 2, 0, 0]
    assert random_below(SEED, 8, 2**32).tolist() == WORDS
    assert random_below(SEED, 8, 1).tolist() == [0] * 8


def test_a_derived_seed_is_a_hash_of_seed_and_use() -> None:
    assert {use: derive_seed(SEED, use).hex() for use in DERIVED} == DERIVED


@given(seeds, st.integers(0, 100), st.integers(0, 100))
@settings(deadline=None)
def test_a_shorter_draw_is_the_start_of_a_longer_one(seed: bytes, count: int, more: int) -> None:
    for draw in (random_bits, random_words, lambda s, n: random_below(s, n, 7)):
        np.testing.assert_array_equal(draw(seed, count), draw(seed, count + more)[:count])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_as_many_come_as_are_asked_for(count: int) -> None:
    assert len(random_bits(SEED, count)) == len(random_words(SEED, count)) == len(random_below(SEED, count, 5)) == count


@pytest.mark.parametrize("bound", [2, 3, 7, 20, 100])
def test_numbers_below_a_bound_are_uniform(bound: int) -> None:
    count = 200_000
    observed = np.bincount(random_below(derive_seed(SEED, b"test"), count, bound), minlength=bound)
    assert len(observed) == bound
    chi_squared = float(((observed - count / bound) ** 2 / (count / bound)).sum())
    assert abs(chi_squared - (bound - 1)) < 5 * (2 * (bound - 1)) ** 0.5


def test_coins_are_fair_and_do_not_repeat() -> None:
    coins = random_bits(derive_seed(SEED, b"test"), 1 << 18)
    assert coins.mean() == pytest.approx(0.5, abs=5 * 0.5 / 2**9)
    for lag in (1, 8, 128, 256):
        assert np.mean(coins[lag:] == coins[:-lag]) == pytest.approx(0.5, abs=5 * 0.5 / 2**9)


def test_two_uses_and_two_seeds_share_nothing() -> None:
    streams = [derive_seed(seed, use) for seed in (SEED, bytes(32)) for use in (b"support", b"strata", b"")]
    words = [frozenset(random_words(each, 1000).tolist()) for each in streams]
    assert all(len(a & b) < 3 for place, a in enumerate(words) for b in words[place + 1 :])

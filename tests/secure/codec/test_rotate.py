"""The rotation keeps lengths, is linear and its own mirror's inverse, and spreads what is large."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.codec.rotate import BLOCK, padded_size, rotate, unrotate

SEED, OTHER = b"s" * 32, b"o" * 32
SIZES = [0, 1, 2, 3, 5, 1023, 1024, 1025, 1500, 2048, 3000]


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def sylvester(size: int) -> np.ndarray:
    """The orthonormal Hadamard matrix entry by entry: the parity of the bits that row and column share."""
    shared = np.arange(size)[:, None] & np.arange(size)
    parity = np.array([int(each).bit_count() & 1 for each in shared.ravel()]).reshape(size, size)
    return np.asarray((1 - 2 * parity) / size**0.5)


@pytest.mark.parametrize(
    ("count", "padded"), [(0, 0), (1, 1), (3, 4), (5, 8), (1023, 1024), (1024, 1024), (1500, 1536)]
)
def test_a_vector_is_padded_to_whole_blocks_and_one_power_of_two(count: int, padded: int) -> None:
    assert padded_size(count) == padded


@given(st.integers(0, 10**6))
def test_padding_is_less_than_the_vector_and_little_more_than_half_a_block(count: int) -> None:
    extra = padded_size(count) - count
    assert 0 <= extra <= max(0, min(count - 1, BLOCK // 2 + count // BLOCK))
    rest = padded_size(count) % BLOCK
    assert rest & (rest - 1) == 0


@pytest.mark.parametrize("count", SIZES)
def test_the_rotation_keeps_lengths_and_angles(count: int) -> None:
    x, y = drawn(count), drawn(count, 1)
    assert rotate(x, SEED).shape == (padded_size(count),)
    assert norm(rotate(x, SEED)) == pytest.approx(norm(x), rel=1e-5)
    inner = np.dot(rotate(x, SEED).astype(np.float64), rotate(y, SEED))
    assert inner == pytest.approx(np.dot(x.astype(np.float64), y), abs=1e-5 * max(1, count))


@pytest.mark.parametrize("count", SIZES)
def test_unrotate_is_the_inverse(count: int) -> None:
    x = drawn(count)
    back = unrotate(rotate(x, SEED).astype(np.float64), count, SEED)
    assert back.shape == (count,)
    assert back.dtype == np.float64
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 64, 1024])
def test_a_block_is_multiplied_by_hadamards_matrix(count: int) -> None:
    """Up to the order and the signs of its columns."""
    columns = np.array([rotate(np.eye(count, dtype=np.float32)[place], SEED) for place in range(count)]).T
    np.testing.assert_allclose(np.abs(columns), count**-0.5, rtol=1e-5)
    signs = np.sign(columns[0])
    ours = {tuple(column) for column in np.sign(columns * signs).T.astype(int)}
    assert ours == {tuple(column) for column in np.sign(sylvester(count)).T.astype(int)}


def test_blocks_have_other_signs() -> None:
    same = rotate(np.repeat(drawn(BLOCK), 2), SEED).reshape(2, BLOCK)
    assert abs(np.corrcoef(same)[0, 1]) < 0.2


def test_where_one_layer_changes_far_more_than_another_all_blocks_have_one_size() -> None:
    x = drawn(8 * BLOCK)
    x[: 2 * BLOCK] *= 30
    rms = np.sqrt(np.mean(np.square(rotate(x, SEED).reshape(8, BLOCK)), axis=1))
    np.testing.assert_allclose(rms, norm(x) / len(x) ** 0.5, rtol=0.3)


@given(st.integers(0, 2100), st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_rotation_is_linear(count: int, a: float, b: float, seed: int) -> None:
    x, y = drawn(count, seed), drawn(count, seed + 1)
    together = rotate((a * x + b * y).astype(np.float32), SEED)
    np.testing.assert_allclose(together, a * rotate(x, SEED) + b * rotate(y, SEED), atol=1e-4)


@pytest.mark.parametrize("count", [3, 1024, 1025, 1500])
def test_the_inverse_of_a_sum_of_any_integers_keeps_its_length(count: int) -> None:
    """What was added in the rounding lies in all of the padded space: unrotating may shorten it and never lengthens."""
    y = np.random.default_rng(1).integers(-9, 9, padded_size(count)).astype(np.float64)
    before = y.copy()
    assert norm(unrotate(y, count, SEED)) <= norm(y) * (1 + 1e-12)
    np.testing.assert_array_equal(y, before)


@pytest.mark.parametrize("place", [0, 1, 700, 1023, 1024, 1499])
def test_one_huge_coordinate_is_spread_over_its_block_evenly(place: int) -> None:
    x = np.zeros(1500, np.float32)
    x[place] = 1000.0
    rotated = np.abs(rotate(x, SEED))
    spread = rotated[:BLOCK] if rotated[0] else rotated[BLOCK:]
    np.testing.assert_allclose(spread, 1000 / len(spread) ** 0.5, rtol=1e-5)
    assert rotated.sum() == pytest.approx(spread.sum(dtype=np.float64), rel=1e-5)


def test_a_constant_vector_becomes_like_a_normal_one() -> None:
    """Without the signs all of a block would fall into one coordinate."""
    rotated = rotate(np.ones(64 * BLOCK, np.float32), SEED)
    assert np.abs(rotated).max() < 6
    assert np.mean(np.abs(rotated) < 1) == pytest.approx(0.683, abs=0.02)


def test_the_same_seed_gives_the_same_rotation_and_another_one_another() -> None:
    x = drawn(1500)
    np.testing.assert_array_equal(rotate(x, SEED), rotate(x, SEED))
    mismatched = unrotate(rotate(x, SEED).astype(np.float64), len(x), OTHER)
    assert abs(np.corrcoef(mismatched, x)[0, 1]) < 0.15


def test_the_vector_that_is_rotated_is_left_as_it_was() -> None:
    x = drawn(1500)
    before = x.copy()
    rotate(x, SEED)
    np.testing.assert_array_equal(x, before)

"""The grid: sums are exact and cannot overflow, rounding is unbiased, and what is cut off is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.codec.quantize import Grid, Thresholds, wrap_free
from propolis.secure.errors import UsageError

# Arithmetic in single precision may blur the rounding by this part of a step.
BLUR = 2.0**-8


@st.composite
def grids(draw: st.DrawFn) -> tuple[Grid, int]:
    """Any grid: from a single level to the finest, for any number of devices that fits."""
    width = draw(st.integers(2, 32))
    most = (2**width - 1) // 2
    devices = draw(st.one_of(st.integers(1, min(most, 1000)), st.just(most)))
    return wrap_free(width, devices, draw(st.floats(1e-6, 1e6))), devices


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def thresholds(count: int, devices: int = 1, place: int = 0, drawn: np.random.Generator | None = None) -> Thresholds:
    return Thresholds(count, devices, place, bytes(32), drawn or rng())


def encode(grid: Grid, x: np.ndarray, drawn: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
    """Alone: the vector and what was cut off."""
    vector, saturated, total = grid.encode(x, thresholds(len(x), drawn=drawn))
    assert total == grid.ring.centre(vector).sum() or not grid.is_wrap_free(1)
    return vector, saturated


@given(grids())
@settings(deadline=None)
def test_the_sum_of_all_devices_at_an_extreme_is_exact(drawn: tuple[Grid, int]) -> None:
    codec, devices = drawn
    extremes = np.array([1.5, -1.5], np.float32) * np.float32(codec.range)
    encoded, saturated = encode(codec, extremes)
    assert saturated == 2
    total = codec.ring.reduce((encoded.astype(np.uint64) * np.uint64(devices)).astype(codec.ring.dtype))
    most = devices * codec.levels
    np.testing.assert_array_equal(codec.ring.centre(total), [most, -most])
    np.testing.assert_array_equal(codec.decode(total), [most * codec.step, -most * codec.step])
    assert most * codec.step == pytest.approx(devices * codec.range)


@pytest.mark.parametrize(("width", "devices"), [(8, 1), (17, 1), (18, 1), (32, 1), (32, 100)])
def test_rounding_never_leaves_the_range(width: int, devices: int) -> None:
    codec = wrap_free(width, devices, 1.0)
    for sign in (1, -1):
        encoded, _ = encode(codec, np.full(100_000, 2.0 * sign, np.float32))
        magnitudes = sign * codec.ring.centre(encoded)
        assert magnitudes.max() == codec.levels
        assert magnitudes.min() >= codec.levels - 1  # blurred


@given(grids())
@settings(deadline=None)
def test_one_level_more_would_overflow(drawn: tuple[Grid, int]) -> None:
    """All of the ring is used: the grid is as fine as it can be."""
    codec, devices = drawn
    assert 2 * devices * codec.levels < 2**codec.width <= 2 * devices * (codec.levels + 1)


@given(grids(), st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.integers(0, 2**32))
@settings(deadline=None)
def test_a_value_goes_to_a_neighbour_on_the_grid(drawn: tuple[Grid, int], values: list[float], seed: int) -> None:
    codec, _ = drawn
    x = (np.array(values) * codec.range).astype(np.float32)
    encoded, saturated = encode(codec, x, np.random.default_rng(seed))
    assert saturated == 0
    assert encoded.dtype == codec.ring.dtype
    assert np.abs(codec.ring.centre(encoded)).max() <= codec.levels
    error = np.abs(codec.decode(encoded) - x.astype(np.float64))
    assert error.max() <= codec.step * (1 + 2 * BLUR) + codec.range * 2.0**-24  # x may be rounded beyond the range


@given(st.integers(1, 20), st.integers(8, 32), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_sum_of_vectors_is_the_sum_within_a_step_each(devices: int, width: int, seed: int) -> None:
    codec, draw = wrap_free(width, devices, 3.0), np.random.default_rng(seed)
    xs = draw.uniform(-3, 3, (devices, 40)).astype(np.float32)
    total = codec.ring.zeros(40)
    for x in xs:
        total += encode(codec, x, draw)[0]
    error = np.abs(codec.decode(codec.ring.reduce(total)) - xs.sum(axis=0, dtype=np.float64))
    assert error.max() <= devices * codec.step * (1 + 2 * BLUR)


@pytest.mark.parametrize(("width", "devices"), [(2, 1), (8, 10), (16, 100), (20, 8), (24, 2), (32, 257), (32, 2)])
def test_rounding_is_unbiased(width: int, devices: int) -> None:
    codec, count = wrap_free(width, devices, 2.0), 1 << 19
    for x in (np.full(count, 0.3), np.full(count, -0.3), rng().uniform(-1.9, 1.9, count)):
        single = x.astype(np.float32)
        error = codec.decode(encode(codec, single)[0]) - single
        assert abs(error.mean()) <= codec.step * (5 * 0.5 / count**0.5 + BLUR)  # five standard errors


def test_rounding_is_random_between_the_two_neighbours() -> None:
    codec = wrap_free(8, 10, 12.0)  # 12 levels: the step is one
    assert codec.step == 1
    encoded = codec.decode(encode(codec, np.full(100_000, 3.25, np.float32))[0])
    assert set(encoded) == {3.0, 4.0}
    assert np.mean(encoded == 4.0) == pytest.approx(0.25, abs=0.01)
    np.testing.assert_array_equal(codec.decode(encode(codec, np.full(1000, -3.0, np.float32))[0]), -3.0)


@given(grids(), st.lists(st.sampled_from([-3.0, -1.01, -0.99, 0.0, 0.99, 1.01, 3.0, 1e30]), max_size=50))
@settings(deadline=None)
def test_what_is_out_of_range_is_cut_off_and_counted(drawn: tuple[Grid, int], relative: list[float]) -> None:
    codec, _ = drawn
    x = (np.array(relative) * codec.range).astype(np.float32)
    encoded, saturated = encode(codec, x)
    assert saturated == sum(abs(value) > 1 for value in relative)
    outside = np.abs(relative) > 1
    np.testing.assert_array_equal(codec.ring.centre(encoded)[outside], codec.levels * np.sign(relative)[outside])


def test_a_long_vector_is_encoded_to_its_end() -> None:
    codec = wrap_free(16, 4, 1.0)
    x = np.linspace(-1.1, 1.1, 3 * 32768 + 7, dtype=np.float32)
    encoded, saturated = encode(codec, x)
    assert saturated == np.count_nonzero(np.abs(x) > 1)
    assert np.abs(codec.decode(encoded) - np.clip(x, -1, 1)).max() <= codec.step * (1 + 2 * BLUR)
    assert len(encode(codec, x[:0])[0]) == 0


@pytest.mark.parametrize(("width", "devices"), [(2, 2), (8, 128), (16, 2**15)])
def test_a_ring_without_room_is_a_mistake(width: int, devices: int) -> None:
    assert wrap_free(width, devices - 1, 1.0).levels == 1
    with pytest.raises(UsageError, match=f"a ring of {width} bits is too small for {devices} devices"):
        wrap_free(width, devices, 1.0)

"""Clipping: what is too long comes out as long as the bound, in its own direction; what is not is untouched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from propolis.secure.codec.clip import clip_l2, l2_norm

vectors = arrays(np.float32, st.integers(0, 50), elements=st.floats(-(2.0**50), 2.0**50, width=32))


def long_norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.longdouble)))


@given(vectors)
@settings(deadline=None)
def test_the_norm_is_that_of_linear_algebra(x: np.ndarray) -> None:
    assert l2_norm(x) == pytest.approx(long_norm(x), rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_norm_of_a_long_vector_is_summed_in_double_precision(dtype: type) -> None:
    x = np.full(1 << 21, 1e-4, dtype)
    x[0] = 1e4
    assert l2_norm(x) == pytest.approx(long_norm(x), rel=1e-9)


@pytest.mark.parametrize("largest", [3e38, 1e-30])
def test_the_norm_of_very_large_and_very_small_values_neither_overflows_nor_vanishes(largest: float) -> None:
    assert l2_norm(np.full(4, largest, np.float32)) == pytest.approx(2 * largest, rel=1e-6)


@given(vectors, st.floats(1e-3, 1e12))
@settings(deadline=None)
def test_nothing_comes_out_longer_than_the_bound_and_the_direction_stays(x: np.ndarray, bound: float) -> None:
    before = x.copy()
    norm, was_clipped = clip_l2(x, bound)
    assert norm == pytest.approx(long_norm(before), rel=1e-9)
    assert was_clipped == (norm > bound)
    if not was_clipped:
        np.testing.assert_array_equal(x, before)
        return
    assert long_norm(x) == pytest.approx(bound, rel=1e-6)
    np.testing.assert_allclose(x, before.astype(np.float64) * (bound / norm), rtol=1e-6, atol=1e-44)


def test_a_vector_of_exactly_the_bound_passes() -> None:
    x = np.array([3.0, 4.0], np.float32)
    assert clip_l2(x, 5.0) == (5.0, False)
    assert clip_l2(x, float(np.nextafter(5.0, 0.0))) == (5.0, True)


def test_an_empty_vector_has_no_length() -> None:
    assert clip_l2(np.zeros(0, np.float32), 1.0) == (0.0, False)

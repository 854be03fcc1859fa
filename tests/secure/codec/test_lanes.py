"""Lanes keep what fits, exactly on their grid, and count what does not."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from propolis.secure.codec.lanes import LANES, decode_lanes, encode_lanes


@given(st.integers(1, 2**20), st.lists(st.floats(-1, 1), max_size=50))
def test_lanes_keep_what_fits(devices: int, relative: list[float]) -> None:
    values = np.array(relative) * 2**32 / devices
    lanes, saturated = encode_lanes(values, devices)
    assert saturated == 0
    np.testing.assert_allclose(decode_lanes(lanes), values, rtol=1e-15, atol=2.0**-31)


@given(st.integers(1, 2**20))
def test_lanes_of_all_devices_at_an_extreme_add_up(devices: int) -> None:
    bound = 2.0**32 / devices
    lanes, saturated = encode_lanes(np.array([1e300, -1e300, bound, -bound, 2 * bound]), devices)
    assert saturated == 3
    total = decode_lanes(LANES.reduce(lanes * np.uint64(devices)))
    np.testing.assert_allclose(total, 2.0**32 * np.array([1, -1, 1, -1, 1]), rtol=1e-9)


def test_lanes_are_exact_on_their_grid() -> None:
    values = np.array([0.0, 1.0, -1.0, 2.0**-30, 123456.75, -(2.0**20)])
    total = LANES.zeros(len(values))
    for _ in range(1000):
        total += encode_lanes(values, 1000)[0]
    np.testing.assert_array_equal(decode_lanes(total), 1000 * values)

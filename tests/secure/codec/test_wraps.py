"""How many values of a sum leave the ring, as computed and as it happens on the real grid."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.codec.quantize import Grid, Thresholds
from propolis.secure.codec.wraps import ALLOWED_WRAPS, GRIDS, choose_grid, expected_wraps, rounding_noise
from propolis.secure.errors import UsageError

COUNT = 200_000
SEED = b"s" * 32


@lru_cache(maxsize=2)
def integers(devices: int, grid: float, correlation: float, count: int = COUNT) -> np.ndarray:
    """The sum that devices of unit root mean square send, before it is taken modulo anything."""
    rng = np.random.default_rng([devices, int(grid * 1000), int(correlation * 1000)])
    common = np.sqrt(correlation) * rng.standard_normal(count, np.float32)
    total, wide = np.zeros(count, np.int64), Grid(24, grid, 2**23 - 1)
    for place in range(devices):
        x = common + np.float32(np.sqrt(1 - correlation)) * rng.standard_normal(count, np.float32)
        thresholds = Thresholds(count, devices, place, SEED, np.random.default_rng([7, place]))
        total += wide.ring.centre(wide.encode(x, thresholds)[0])
    return total


def wraps_in(total: np.ndarray, width: int) -> int:
    edge = 2 ** (width - 1)
    return int(np.count_nonzero((total >= edge) | (total < -edge)))


@pytest.mark.parametrize("devices", [3, 10, 20])
def test_as_many_wraps_happen_as_are_expected(devices: int) -> None:
    """On grids on which some do: from one in ten of the values to one in ten thousand."""
    checked = 0
    for grid in GRIDS[30::9]:
        for width in (3, 4, 5):
            expected = expected_wraps(COUNT, devices, width, grid, 0.0)
            if 1e-4 * COUNT < expected < 0.1 * COUNT:
                checked += 1
                seen = wraps_in(integers(devices, grid, 0.0), width)
                assert seen == pytest.approx(expected, abs=5 * expected**0.5 + 0.01 * expected)
    assert checked >= 3


@pytest.mark.parametrize("correlation", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("devices", [3, 20])
def test_of_devices_that_are_alike_little_less_is_expected_than_happens(devices: int, correlation: float) -> None:
    """What they have in common is not rounded with the rest: nearly the same, and mostly a little too much."""
    checked = 0
    for grid in GRIDS[39::9]:
        for width in (3, 4, 5):
            expected = expected_wraps(COUNT, devices, width, grid, correlation)
            if 1e-3 * COUNT < expected < 0.1 * COUNT:
                checked += 1
                seen = wraps_in(integers(devices, grid, correlation), width)
                assert 0.75 * expected - 5 * expected**0.5 < seen < 1.15 * expected + 5 * expected**0.5
    assert checked >= 3


@pytest.mark.parametrize(("devices", "width"), [(200, 9), (400, 10)])
def test_wide_rings_are_taken_for_normal(devices: int, width: int) -> None:
    grid = next(g for g in GRIDS if expected_wraps(1, devices, width, g, 0.0) < 0.01)
    count = 50_000
    expected = expected_wraps(count, devices, width, grid, 0.0)
    seen = wraps_in(integers(devices, grid, 0.0, count), width)
    assert seen == pytest.approx(expected, abs=5 * expected**0.5 + 0.05 * expected)


places = st.integers(48, len(GRIDS) - 1)


@pytest.mark.parametrize("devices", [1, 20, 300])
def test_on_a_far_too_fine_grid_nearly_everything_wraps(devices: int) -> None:
    assert expected_wraps(1000, devices, 3, GRIDS[0], 0.0) > 900


@given(st.integers(1, 60), st.integers(2, 12), places, places, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_coarser_grid_has_fewer_wraps(devices: int, width: int, one: int, other: int, correlation: float) -> None:
    fine, coarse = sorted((one, other))
    finer, coarser = (expected_wraps(1000, devices, width, GRIDS[place], correlation) for place in (fine, coarse))
    assert coarser <= finer * (1 + 1e-6) + 1e-9


@given(st.integers(1, 60), st.integers(2, 8), places, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_wider_ring_has_fewer_wraps(devices: int, width: int, place: int, correlation: float) -> None:
    narrow, wide = (expected_wraps(1000, devices, each, GRIDS[place], correlation) for each in (width, width + 2))
    assert wide <= narrow * (1 + 1e-6) + 1e-9


@given(st.integers(2, 60), st.integers(3, 8), st.floats(0, 0.5))
@settings(max_examples=60, deadline=None)
def test_devices_that_are_more_alike_wrap_more(devices: int, width: int, low: float) -> None:
    _, grid = choose_grid(10_000, devices, width, low)
    less, more = (expected_wraps(10_000, devices, width, grid / 2, each) for each in (low, low + 0.4))
    assert less < more


@given(st.integers(1, 10**7), st.integers(1, 60), st.integers(3, 9), st.floats(0, 1), st.floats(1e-4, 1))
@settings(max_examples=60, deadline=None)
def test_the_chosen_grid_keeps_its_promise_and_is_the_finest_that_does(
    count: int, devices: int, width: int, correlation: float, allowed: float
) -> None:
    enough, grid = choose_grid(count, devices, width, correlation, allowed)
    assert enough >= width
    assert expected_wraps(count, devices, enough, grid, correlation) <= allowed / 4
    place = GRIDS.index(grid)
    if place:
        assert expected_wraps(count, devices, enough, GRIDS[place - 1], correlation) > allowed / 4
    if enough > width:
        assert expected_wraps(count, devices, enough - 1, GRIDS[-1], correlation) > allowed / 4


def test_a_ring_without_room_is_widened_by_as_little_as_helps() -> None:
    assert choose_grid(10**6, 20, 4, 0.0)[0] == 4
    assert choose_grid(10**6, 1000, 4, 0.0)[0] > 4
    with pytest.raises(UsageError, match="no ring is large enough for the sum of 5 devices"):
        choose_grid(10**6, 5, 33, 0.0)


@pytest.mark.parametrize("width", [4, 8, 12])
def test_devices_that_are_all_the_same_are_given_room_too(width: int) -> None:
    enough, grid = choose_grid(10**6, 20, width, 1.0)
    edge, deviations = 2 ** (enough - 1) * grid, 5.5
    assert enough == width
    assert edge > 20 * deviations


@pytest.mark.parametrize(("width", "correlation"), [(4, 0.05), (5, 0.3), (6, 0.0)])
def test_a_sum_of_a_million_values_does_not_wrap_at_the_chosen_grid(width: int, correlation: float) -> None:
    enough, grid = choose_grid(10**6, 20, width, correlation)
    total = integers(20, grid, correlation, 10**6)
    assert wraps_in(total, enough) == 0
    assert wraps_in(total, enough - 2) > 0
    assert ALLOWED_WRAPS <= 1e-2


@pytest.mark.parametrize("devices", [3, 20])
@pytest.mark.parametrize("grid", [0.1, 0.7, 1.5, 4.0])
def test_the_rounding_noise_is_that_of_the_real_grid(devices: int, grid: float) -> None:
    rng = np.random.default_rng(0)
    xs = rng.standard_normal((devices, COUNT)).astype(np.float32)
    wide, total = Grid(24, grid, 2**23 - 1), np.zeros(COUNT)
    for place, x in enumerate(xs):
        thresholds = Thresholds(COUNT, devices, place, SEED, np.random.default_rng([7, place]))
        total += wide.ring.centre(wide.encode(x, thresholds)[0])
    extra = np.mean(np.square(total)) - np.mean(np.square(xs.sum(axis=0, dtype=np.float64))) / grid**2
    assert rounding_noise(devices, grid) == pytest.approx(extra, abs=0.03 * devices + 0.01 * devices / grid**2)

"""How coarse a grid must be for a sum to stay in its ring: the expected number of wraps, and its inverse.

A small ring costs few bits, and the sum of many devices must fit. After the rotation a coordinate is close to normal,
so its sum is the sum of n rounded normal numbers; with thresholds from n strata (`propolis.secure.codec.quantize`)
these are independent, and the distribution of their sum is a convolution, computed here without approximation. What
the devices have in common is added as one normal number with the standard deviation that their correlation gives.
"""

from __future__ import annotations

from functools import lru_cache
from math import erfc, sqrt

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import UsageError

# Wraps per round that a width is chosen for, a quarter of what is promised: normal is what coordinates nearly are.
ALLOWED_WRAPS = 1e-2
_MARGIN = 4.0

# Grids that are tried, as steps in units of a device's root mean square: finer gains nothing, coarser is mere noise.
GRIDS = tuple(float(grid) for grid in np.geomspace(0.02, 64.0, 120))
# Above, a sum takes so many values that the normal distribution is exact enough.
_WIDEST_DISCRETE = 8
_WIDEST = 32
_STRATA = 32


def expected_wraps(count: int, devices: int, width: int, grid: float, correlation: float) -> float:
    """Expected number of the `count` coordinates of a sum that leave the ring.

    Args:
        count: coordinates that travel.
        devices: n.
        width: of the ring, in bits.
        grid: step of the grid, in units of the root mean square of one device's coordinates.
        correlation: mean correlation between two devices' coordinates, in [0, 1].
    """
    edge = 2.0 ** (width - 1)
    common = devices * sqrt(correlation) / grid
    if width > _WIDEST_DISCRETE:
        own = devices * (1 - correlation) / grid**2 + devices / 4
        return float(count * erfc(edge / sqrt(2 * (own + common**2))))
    values, probabilities = _sum_of_rounded(devices, grid / sqrt(max(1 - correlation, 1e-9)), width)
    above = _upper_tail(edge - 0.5 - values, common)
    below = _upper_tail(edge + 0.5 + values, common)
    return float(count * np.dot(probabilities, above + below))


def rounding_noise(devices: int, grid: float) -> float:
    """Variance of the rounding error in a coordinate of the sum, in steps^2; `grid` as above."""
    values, probabilities = _sum_of_rounded(devices, grid, _WIDEST_DISCRETE)
    return max(0.0, float(np.dot(probabilities, values**2)) - devices / grid**2) if grid >= 0.5 else devices / 12


@lru_cache(maxsize=256)
def choose_grid(
    count: int, devices: int, width: int, correlation: float, allowed: float = ALLOWED_WRAPS
) -> tuple[int, float]:
    """The finest grid on which no more wraps are expected than are allowed in a round, with a margin of four.

    Args:
        count: coordinates that travel.
        devices: n.
        width: of the ring, in bits.
        correlation: as in `expected_wraps`.
        allowed: wraps in a round.

    Returns:
        The width, which is wider than was asked for where even the coarsest grid has no room in that; and the grid.

    Raises:
        UsageError: no ring is large enough.
    """

    def is_fine(width: int, place: int) -> bool:
        return expected_wraps(count, devices, width, GRIDS[place], correlation) <= allowed / _MARGIN

    low, high = -1, len(GRIDS) - 1  # not fine, fine
    enough = next((wider for wider in range(width, _WIDEST + 1) if is_fine(wider, high)), 0)
    if not enough:
        raise UsageError(f"no ring is large enough for the sum of {devices} devices")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_fine(enough, middle) else (middle, high)
    return enough, GRIDS[high]


@lru_cache(maxsize=256)
def _sum_of_rounded(devices: int, grid: float, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distribution of the sum of n normal numbers of standard deviation 1 / grid, each rounded by its own stratum.

    Returns:
        The values, (m,), and their probabilities.
    """
    half = max(64, 2 ** (width + 1))
    values = np.arange(-half, half, dtype=np.float64)
    strata = min(devices, _STRATA)
    finer = -(-_STRATA // strata)  # points within a stratum
    thresholds = (np.arange(strata * finer) + 0.5) / (strata * finer)
    edges = (np.arange(-half, half + 1) - thresholds[:, None]) * grid
    below = 0.5 * _erfc(-edges / sqrt(2))
    below[:, 0], below[:, -1] = 0.0, 1.0  # the outermost values stand for all beyond
    own = np.diff(below, axis=1).reshape(strata, finer, -1).mean(axis=1)
    transformed = np.fft.fft(np.fft.ifftshift(own, axes=1), axis=1)
    times = np.full(strata, devices // strata) + (np.arange(strata) < devices % strata)
    product = np.prod(transformed ** times[:, None], axis=0)
    return values, np.clip(np.fft.fftshift(np.fft.ifft(product).real), 0.0, 1.0)


def _upper_tail(at: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """P(X > at) for X normal with mean 0, or X = 0."""
    if deviation < 1e-9:
        return (at < 0).astype(np.float64)
    return 0.5 * _erfc(at / (deviation * sqrt(2)))


def _erfc(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The complementary error function of each element."""
    return np.array([erfc(each) for each in x.ravel()]).reshape(x.shape)

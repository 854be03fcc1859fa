"""Lanes: 64-bit fixed point for what is short and wants more than a coarse grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.ring import Ring, Vector

LANES = Ring(64)
_LANE_STEP = 2.0**-30


def encode_lanes(values: NDArray[np.float64], devices: int) -> tuple[Vector, int]:
    """Real values as 64-bit lanes with 30 fractional bits.

    Args:
        values: (m,) finite.
        devices: largest number of lane vectors that will be added up.

    Returns:
        The lanes, and how many values were outside of +-2^32 / devices and were cut off.
    """
    bound = 2.0**62 * _LANE_STEP / devices
    clipped = np.clip(values, -bound, bound)
    return LANES.embed(np.rint(clipped / _LANE_STEP).astype(np.int64)), int(np.count_nonzero(clipped != values))


def decode_lanes(total: Vector) -> NDArray[Any]:
    """The sum of lanes as real numbers."""
    return LANES.centre(total) * _LANE_STEP

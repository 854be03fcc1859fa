"""Real vectors on a shared grid of integers, so that their sum is exact and cannot overflow.

Stochastic rounding keeps the mean of many devices unbiased: each coordinate goes to one of its two neighbours on
the grid, to the nearer one more often.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import UsageError
from propolis.secure.ring import Ring, Vector

# Lanes: 64-bit fixed point for what is short and wants more than a coarse grid.
LANES = Ring(64)
_LANE_STEP = 2.0**-30
_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Numbers in [-range, range] as integers in [-levels, levels], 2 * devices * levels < 2^width.

    So the sum of as many vectors as there are devices never leaves the ring's range: overflow is impossible. All
    width bits are used: the fewer devices, the finer the grid.

    Args:
        width: bits of the ring, which is what each number costs on the wire.
        devices: largest number of vectors that will be added up.
        range: largest magnitude that is represented.

    Raises:
        UsageError: the ring has no room for a single level from each device, or an argument is out of range.
    """

    width: int
    devices: int
    range: float

    def __post_init__(self) -> None:
        if not (2 <= self.width <= 32 and self.devices >= 1 and 0 < self.range < inf):
            raise UsageError(
                f"need 2 <= width <= 32, devices >= 1 and a finite range > 0, got {self.width}, {self.devices} and "
                f"{self.range}"
            )
        if self.levels < 1:
            raise UsageError(f"a ring of {self.width} bits is too small for {self.devices} devices")

    @property
    def ring(self) -> Ring:
        """Z_2^width."""
        return Ring(self.width)

    @property
    def levels(self) -> int:
        """Steps of the grid from 0 to `range`."""
        return int((2**self.width - 1) // (2 * self.devices))

    @property
    def step(self) -> float:
        """Distance between two neighbours on the grid."""
        return self.range / self.levels

    def encode(self, x: NDArray[np.float32], rng: np.random.Generator) -> tuple[Vector, int]:
        """Clip and round to the grid.

        Args:
            x: (d,) finite.
            rng: for the rounding.

        Returns:
            The vector in the ring, and how many coordinates were outside of the range.
        """
        ring = self.ring
        out = ring.zeros(len(x))
        # Single precision leaves 2^-8 of a step to round by; the cut on integers can't be off by one.
        real, whole = (np.float32, np.int32) if self.levels < 2**16 else (np.float64, np.int64)
        saturated = 0
        for start in range(0, len(x), _BLOCK):  # in pieces that stay in the cache
            block: NDArray[Any] = x[start : start + _BLOCK].astype(real)
            block *= 1 / self.step
            saturated += int(np.count_nonzero(np.abs(block) > self.levels * (1 + 1e-6)))
            np.clip(block, -self.levels, self.levels, out=block)
            block += rng.random(len(block), dtype=real)
            integers = np.floor(block, out=block).astype(whole)
            np.clip(integers, -self.levels, self.levels, out=integers)
            out[start : start + _BLOCK] = ring.embed(integers)
        return out, saturated

    def decode(self, total: Vector) -> NDArray[np.float64]:
        """The sum of the encoded vectors as real numbers."""
        return self.ring.centre(total).astype(np.float64) * self.step


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

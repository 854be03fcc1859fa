"""Real vectors on a shared grid of integers, and the rounding that keeps their mean unbiased.

A coordinate between two points of the grid goes to the upper one when a threshold that is uniform in [0, 1) says so.
The devices of a round take their thresholds from different strata of [0, 1), so that in the sum their rounding errors
cancel in good part (correlated quantization: Suresh et al., ICML 2022); each on its own stays uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.codec.public_random import derive_seed, random_below
from propolis.secure.errors import UsageError
from propolis.secure.ring import Ring, Vector

LARGEST_LEVELS = 2**31 - 1
_BLOCK = 1 << 15
_BELOW_ONE = np.float32(1 - 2**-24)


@dataclass(frozen=True, slots=True)
class Grid:
    """Multiples of a step, at most `levels` to each side of zero, added up modulo 2^width.

    Args:
        width: bits of the ring, which is what a coordinate costs on the wire.
        step: distance between two neighbours on the grid.
        levels: largest integer that one device sends.

    Raises:
        UsageError: an argument is out of range.
    """

    width: int
    step: float
    levels: int

    def __post_init__(self) -> None:
        if not (2 <= self.width <= 32 and 0 < self.step < inf and 1 <= self.levels <= LARGEST_LEVELS):
            raise UsageError(
                f"need 2 <= width <= 32, a finite step > 0 and 1 <= levels < 2^31, got {self.width}, {self.step} and "
                f"{self.levels}"
            )

    @property
    def ring(self) -> Ring:
        """Z_2^width."""
        return Ring(self.width)

    @property
    def range(self) -> float:
        """Largest magnitude of one device that is represented."""
        return self.levels * self.step

    def is_wrap_free(self, devices: int) -> bool:
        """Whether the sum over so many devices can't leave the ring: 2 n L < 2^w."""
        return 2 * devices * self.levels < 1 << self.width

    def encode(self, x: NDArray[np.float32], thresholds: Thresholds) -> tuple[Vector, int, int]:
        """Round to the grid.

        Args:
            x: (d,) finite.
            thresholds: this device's.

        Returns:
            The vector in the ring; how many coordinates were out of range and were cut off; the sum of the integers.
        """
        ring = self.ring
        out = ring.zeros(len(x))
        # Single precision leaves 2^-8 of a step to round by; the cut on integers can't be off by one.
        real, whole = (np.float32, np.int32) if self.levels < 2**16 else (np.float64, np.int64)
        saturated = total = 0
        for start in range(0, len(x), _BLOCK):  # in pieces that stay in the cache
            block: NDArray[Any] = x[start : start + _BLOCK].astype(real)
            block *= 1 / self.step
            saturated += int(np.count_nonzero(np.abs(block) > self.levels * (1 + 1e-6)))
            np.clip(block, -self.levels, self.levels, out=block)
            block += thresholds.piece(start, len(block))
            integers = np.floor(block, out=block).astype(whole)
            np.clip(integers, -self.levels, self.levels, out=integers)
            total += int(integers.sum(dtype=np.int64))
            out[start : start + _BLOCK] = ring.embed(integers)
        return out, saturated, total

    def decode(self, total: Vector) -> NDArray[np.float64]:
        """The sum of the encoded vectors as real numbers."""
        return self.ring.centre(total).astype(np.float64) * self.step


def wrap_free(width: int, devices: int, range_: float) -> Grid:
    """The finest grid up to `range_` on which the sum of so many devices cannot leave the ring.

    Raises:
        UsageError: the ring has no room for a single level from each device.
    """
    levels = (2**width - 1) // (2 * devices) if devices >= 1 else 0
    if levels < 1:
        raise UsageError(f"a ring of {width} bits is too small for {devices} devices")
    return Grid(width, range_ / levels, levels)


class Thresholds:
    """One device's rounding thresholds in a round.

    Coordinate j of the device in place i has its threshold in stratum (p(i) + r_j) mod n, where the permutation p and
    the offsets r are drawn from the round's public seed, and is uniform there by the device's own randomness.

    Args:
        count: number of coordinates.
        devices: n, in the cohort.
        place: i, this device's in the cohort's order.
        seed: 32 bytes, the round's.
        rng: this device's own.
    """

    def __init__(self, count: int, devices: int, place: int, seed: bytes, rng: np.random.Generator) -> None:
        self._devices, self._rng = devices, rng
        order = np.argsort(random_below(derive_seed(seed, b"order"), devices, 2**32), kind="stable")
        self._stratum = np.uint32(order[place])
        self._offsets = random_below(derive_seed(seed, b"strata"), count, devices)

    def piece(self, start: int, count: int) -> NDArray[np.float32]:
        """The thresholds of coordinates start, ..., start + count - 1, which are asked for in rising order once."""
        strata = (self._offsets[start : start + count] + self._stratum) % np.uint32(self._devices)
        drawn = self._rng.random(count, dtype=np.float32)
        drawn += strata
        drawn *= np.float32(1 / self._devices)
        return np.minimum(drawn, _BELOW_ONE, out=drawn)

"""The codec from end to end: what a device does to its update, and its mirror on the sum.

    encode       clip -> sparsify -> rotate -> quantize        (then masked, added up and unmasked)
    decode_sum   scatter <- unrotate <- dequantize

Every stage between the clip and the rounding is linear and the same for all devices, so the decoded sum is the sum of
the clipped updates up to rounding: in L2, over the coordinates that travel and weighted by `Support.gain`, within
n * step * sqrt(size), where nothing was cut off and nothing wrapped. A stage that needs to see a single update has no
place here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.codec.clip import clip_l2, l2_norm
from propolis.secure.codec.encoding import Encoding, Shapes
from propolis.secure.codec.public_random import derive_seed
from propolis.secure.codec.quantize import Thresholds
from propolis.secure.codec.rotate import padded_size, rotate, unrotate
from propolis.secure.codec.sparsify import support_of
from propolis.secure.ring import Vector


@dataclass(frozen=True, slots=True, repr=False)
class Encoded:
    """What a device sends, and what it says about it in its lanes.

    Attributes:
        vector: (size,) in the ring.
        norm: L2 norm of the update before the clip.
        was_clipped: whether it was too long.
        energy: mean square of the coordinates before they were rounded, in steps^2.
        largest: largest magnitude of a coordinate before it was rounded, in steps.
        saturated: coordinates that were out of range and were cut off.
        total: sum of the integers, by which wraps are counted.
    """

    vector: Vector
    norm: float
    was_clipped: bool
    energy: float
    largest: float
    saturated: int
    total: int


@dataclass(frozen=True, slots=True, repr=False)
class Decoded:
    """What the server learns.

    Attributes:
        sum: (d,) float64, the sum of the updates; zero where nothing travelled.
        energy: mean square of the summed coordinates, in steps^2.
        total: sum of the integers; differs from the devices' own totals by 2^width for every wrap.
    """

    sum: NDArray[np.float64]
    energy: float
    total: int


class Pipeline:
    """The codec of one round, the same on all its devices and on the server.

    Args:
        encoding: of the round.
        devices: n, in its cohort.
        shapes: of the arrays by name.
        model: the arrays that the round starts from.
    """

    def __init__(self, encoding: Encoding, devices: int, shapes: Shapes, model: Mapping[str, NDArray[Any]]) -> None:
        self.encoding, self.devices, self.shapes = encoding, devices, shapes
        self.support = support_of(encoding, shapes, model)
        self._rotation = derive_seed(encoding.seed, b"rotation")

    @property
    def size(self) -> int:
        """Length of the vector that travels."""
        return padded_size(self.support.size) if self.encoding.rotated else self.support.size

    def encode(self, x: NDArray[np.float32], place: int, rng: np.random.Generator) -> Encoded:
        """One device's update in the ring.

        Args:
            x: (d,) finite; it is used up.
            place: this device's in the cohort's order.
            rng: this device's own, for the rounding.
        """
        encoding = self.encoding
        norm, was_clipped = clip_l2(x, encoding.clip)
        y = self.support.gather(x)
        if encoding.rotated:
            y = rotate(y, self._rotation)
        thresholds = Thresholds(self.size, self.devices, place, encoding.seed, rng)
        vector, saturated, total = encoding.grid.encode(y, thresholds)
        energy = (l2_norm(y) / encoding.step) ** 2 / max(1, len(y))
        largest = float(np.abs(y).max(initial=0.0)) / encoding.step
        return Encoded(vector, norm, was_clipped, energy, largest, saturated, total)

    def decode_sum(self, total: Vector) -> Decoded:
        """The sum of encoded updates, (size,) in the ring."""
        integers = self.encoding.grid.ring.centre(total)
        y = integers.astype(np.float64)
        energy = l2_norm(y) ** 2 / max(1, len(y))
        y *= self.encoding.step
        if self.encoding.rotated:
            y = unrotate(y, self.support.size, self._rotation)
        return Decoded(self.support.scatter(y), energy, int(integers.sum()))

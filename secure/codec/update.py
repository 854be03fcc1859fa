"""An update as one vector and a few lanes that can be added up, and their sum as a weighted mean.

A device sends z = (w / w_max) * change for each array: on the grid of `FixedPoint` where coarse steps will do, as
64-bit lanes where not. Its weight, its metrics times its weight, and what the next round's range is chosen by are
lanes too. So the server divides sums by a sum, and sees nothing of one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.codec.fixed_point import FixedPoint, decode_lanes, encode_lanes
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.ring import Vector
from propolis.secure.wire import between, sized

# Lanes of every upload: the weight, coordinates that were cut off, the largest magnitude on the grid.
_HEAD_LANES = 3
# The range of the next round, in units of the mean of the devices' largest magnitudes.
_HEADROOM = 4.0
_SMALLEST_RANGE, _LARGEST_RANGE = 1e-12, 1e12
# Of the largest weight; a mean over less is a division by what a lying device made of it.
_SMALLEST_SHARE = 2.0**-20

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How updates become vectors that can be added up; part of what all devices of a round agree on.

    Attributes:
        width: bits of the ring of the update.
        range: largest magnitude of one weighted change; what exceeds it is cut off and counted.
        max_weight: weights are taken relative to this public maximum; larger ones are cut to it and counted.
        weight_key: the metric that is the weight.
        quantized: names of the arrays that travel on the grid of the ring, sorted.
        exact: names of the arrays that travel as lanes, sorted.
    """

    width: int = between(2, 32)
    range: float = between(_SMALLEST_RANGE, _LARGEST_RANGE)
    max_weight: float = between(1e-9, 1e18)
    weight_key: str = sized(1, 200)
    quantized: tuple[str, ...] = sized(1, 1000, count=2**16)
    exact: tuple[str, ...] = sized(1, 1000, count=2**16)

    def dimension(self, shapes: Shapes) -> int:
        """Length of the vector, for arrays of these shapes."""
        return sum(prod(shapes[name]) for name in self.quantized)

    def fixed_lanes(self, shapes: Shapes) -> int:
        """Number of lanes before those of the metrics."""
        return _HEAD_LANES + sum(prod(shapes[name]) for name in self.exact)


@dataclass(frozen=True, slots=True, repr=False)
class Update:
    """What a device has to say.

    Attributes:
        changes: new minus old, by name of the array; any shape, a floating type.
        weight: in the unit of the application, mostly examples.
        metrics: by name, without the weight.
    """

    changes: Mapping[str, NDArray[Any]]
    weight: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Mean:
    """What the server learns.

    Attributes:
        changes: weighted mean by name, of the arrays' shapes, float64.
        metrics: weighted means.
        weight: sum of the weights.
        saturated: coordinates that were outside of the range, over all devices.
        largest: mean over the devices of the largest magnitude of a weighted change.
    """

    changes: Mapping[str, NDArray[np.float64]]
    metrics: Mapping[str, float]
    weight: float
    saturated: int
    largest: float


def encode_update(
    update: Update, encoding: Encoding, devices: int, rng: np.random.Generator
) -> tuple[Vector, Vector, tuple[str, ...]]:
    """An update in the ring.

    Args:
        update: with exactly the arrays that `encoding` names.
        encoding: of the round.
        devices: in the round's cohort.
        rng: for the rounding.

    Returns:
        The vector, (d,) in Z_2^width; the lanes, (m,) in Z_2^64; the names of the metrics, which are the last lanes.

    Raises:
        PeerError: the weight is not positive and finite, or a change or a metric is not finite.
    """
    if not 0 < update.weight < inf:
        raise PeerError(Refusal.WEIGHT, f"the weight must be positive and finite, got {update.weight:g}")
    # Cut and not refused: a refusal would tell the server whether the weight is above a bound of its choice.
    share = min(update.weight / encoding.max_weight, 1.0)
    grid = _flat(update.changes, encoding.quantized, np.float32)
    exact = _flat(update.changes, encoding.exact, np.float64)
    if not (np.isfinite(grid).all() and np.isfinite(exact).all()):
        raise PeerError(Refusal.NOT_FINITE, "the update is infinite or NaN")
    names = tuple(sorted(update.metrics))
    if not all(isfinite(value) for value in update.metrics.values()):
        raise PeerError(Refusal.NOT_FINITE, "a metric is infinite or NaN")
    grid *= np.float32(share)
    vector, saturated = FixedPoint(encoding.width, devices, encoding.range).encode(grid, rng)
    largest = float(np.abs(grid).max(initial=0.0))
    saturated += update.weight > encoding.max_weight
    lanes = [share, float(saturated), largest, *(share * exact), *(share * update.metrics[name] for name in names)]
    encoded, cut = encode_lanes(np.array(lanes, np.float64), devices)
    if cut:  # a metric or a counter beyond billions: counted with the others
        lanes[1] += cut
        encoded, _ = encode_lanes(np.array(lanes, np.float64), devices)
    return vector, encoded, names


def decode_mean(
    total: Vector, lanes: Vector, names: Iterable[str], encoding: Encoding, shapes: Shapes, devices: int, alive: int
) -> Mean:
    """The weighted mean in a sum of encoded updates.

    Args:
        total: sum of the vectors.
        lanes: sum of the lanes.
        names: of the metrics.
        encoding: of the round.
        shapes: of the arrays by name.
        devices: in the round's cohort.
        alive: how many of them are in the sum.

    Raises:
        PeerError: the weights do not add up to something that is positive and not tiny: a device lies, or the
            maximum is a million times too large.
    """
    values = decode_lanes(lanes)
    share, saturated, largest = (float(value) for value in values[:_HEAD_LANES])
    if not alive * _SMALLEST_SHARE < share <= alive * (1 + 1e-6):
        weights = f"{share * encoding.max_weight:g}, of at most {encoding.max_weight:g} each"
        raise PeerError(Refusal.WEIGHT, f"{alive} devices' weights add up to {weights}")
    means = FixedPoint(encoding.width, devices, encoding.range).decode(total) / share
    fixed = encoding.fixed_lanes(shapes)
    changes = {
        **_shaped(means, encoding.quantized, shapes),
        **_shaped(values[_HEAD_LANES:fixed] / share, encoding.exact, shapes),
    }
    metrics = dict(zip(names, (float(value) / share for value in values[fixed:]), strict=True))
    return Mean(changes, metrics, share * encoding.max_weight, round(saturated), largest / alive)


def following_range(range_: float, largest: float) -> float:
    """The range of the next round: some headroom over what was seen, and within a factor of two of this one's.

    So one lying device cannot drag it far in a round; over many rounds it can.
    """
    wanted = min(max(_HEADROOM * largest, range_ / 2), range_ * 2)
    return min(max(wanted, _SMALLEST_RANGE), _LARGEST_RANGE)


def _flat(changes: Mapping[str, NDArray[Any]], names: Iterable[str], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    parts = [np.asarray(changes[name], dtype).ravel() for name in names]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _shaped(flat: NDArray[np.float64], names: Iterable[str], shapes: Shapes) -> dict[str, NDArray[np.float64]]:
    arrays, start = {}, 0
    for name in names:
        size = prod(shapes[name])
        arrays[name] = flat[start : start + size].reshape(shapes[name])
        start += size
    return arrays

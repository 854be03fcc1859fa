"""An update as one vector and a few lanes that can be added up, and their sum as a weighted mean.

A device sends z = (w / w_max) * change for each array: through the codec's pipeline where a coarse grid will do, as
64-bit lanes where not. Its weight, its metrics times its weight, and what the next round's scale is chosen by are
lanes too. So the server divides sums by a sum, and sees nothing of one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from propolis.secure.codec.encoding import Encoding, Shapes
from propolis.secure.codec.lanes import LANES, decode_lanes, encode_lanes
from propolis.secure.codec.pipeline import Decoded, Encoded, Pipeline
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.ring import Vector

# Lanes of every upload, all but the first one in units that the grid's step makes harmless: the weight, coordinates
# that were cut off, clipped updates, largest magnitude, norm, energy. One more is a whole number: the integers' sum.
_HEAD_LANES = 6
_WHOLE_LANES = 1
# Of the largest weight; a mean over less is a division by what a lying device made of it.
_SMALLEST_SHARE = 2.0**-20


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
        alive: devices in the sum.
        saturated: values that were outside of their range and were cut off, over all devices.
        clipped: share of the devices whose update was longer than the bound.
        wraps: coordinates of the sum that left the ring; those in opposite directions cancel out here.
        largest: mean over the devices of the largest magnitude of a coordinate that travelled.
        norm: mean L2 norm of a weighted change, before the clip.
        rms: root mean square of one device's coordinates that travelled.
        sum_rms: the same of the sum.
    """

    changes: Mapping[str, NDArray[np.float64]]
    metrics: Mapping[str, float]
    weight: float
    alive: int
    saturated: int
    clipped: float
    wraps: int
    largest: float
    norm: float
    rms: float
    sum_rms: float


def count_lanes(encoding: Encoding, shapes: Shapes) -> int:
    """Number of an upload's lanes before those of the metrics."""
    return _WHOLE_LANES + _HEAD_LANES + sum(prod(shapes[name]) for name in encoding.exact)


def encode_update(
    update: Update, pipeline: Pipeline, place: int, rng: np.random.Generator
) -> tuple[Vector, Vector, tuple[str, ...]]:
    """An update in the ring.

    Args:
        update: with exactly the arrays that the encoding names.
        pipeline: of the round.
        place: this device's in the cohort's order.
        rng: for the rounding.

    Returns:
        The vector, (pipeline.size,) in Z_2^width; the lanes, (m,) in Z_2^64; the names of the metrics, which are the
        last lanes.

    Raises:
        PeerError: the weight is not positive and finite, or a change or a metric is not finite.
    """
    encoding, devices = pipeline.encoding, pipeline.devices
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
    encoded = pipeline.encode(grid, place, rng)
    too_heavy = update.weight > encoding.max_weight
    lanes = _head(share, encoded, pipeline, too_heavy)
    lanes += [*(share * exact), *(share * update.metrics[name] for name in names)]
    packed, cut = encode_lanes(np.array(lanes, np.float64), devices)
    if cut:  # a metric or a counter beyond billions: counted with the others
        lanes[1] += cut
        packed, _ = encode_lanes(np.array(lanes, np.float64), devices)
    return encoded.vector, np.append(LANES.embed(np.array([encoded.total])), packed), names


def _head(share: float, encoded: Encoded, pipeline: Pipeline, too_heavy: bool) -> list[float]:
    norm = encoded.norm / (pipeline.encoding.step * sqrt(max(1, pipeline.size)))
    saturated = float(encoded.saturated + too_heavy)
    energy = encoded.energy / pipeline.encoding.levels**2
    return [share, saturated, float(encoded.was_clipped), encoded.largest, norm, energy]


def decode_mean(total: Vector, lanes: Vector, names: Iterable[str], pipeline: Pipeline, alive: int) -> Mean:
    """The weighted mean in a sum of encoded updates.

    Args:
        total: sum of the vectors.
        lanes: sum of the lanes.
        names: of the metrics.
        pipeline: of the round.
        alive: how many devices are in the sum.

    Raises:
        PeerError: the weights do not add up to something that is positive and not tiny: a device lies, or the
            maximum is a million times too large.
    """
    encoding, shapes = pipeline.encoding, pipeline.shapes
    values = decode_lanes(lanes[_WHOLE_LANES:])
    share, saturated, clipped, largest, norm, energy = (float(value) for value in values[:_HEAD_LANES])
    if not alive * _SMALLEST_SHARE < share <= alive * (1 + 1e-6):
        weights = f"{share * encoding.max_weight:g}, of at most {encoding.max_weight:g} each"
        raise PeerError(Refusal.WEIGHT, f"{alive} devices' weights add up to {weights}")
    decoded = pipeline.decode_sum(total)
    fixed = count_lanes(encoding, shapes) - _WHOLE_LANES
    changes = {
        **_shaped(decoded.sum / share, encoding.quantized, shapes),
        **_shaped(values[_HEAD_LANES:fixed] / share, encoding.exact, shapes),
    }
    step = encoding.step
    # A lying device's lanes can say anything: take them for no more than is possible.
    norm = min(max(norm / alive, 0.0), float(encoding.levels))
    energy = min(max(energy / alive, 0.0), 1.0)
    return Mean(
        changes=changes,
        metrics=dict(zip(names, (float(value) / share for value in values[fixed:]), strict=True)),
        weight=share * encoding.max_weight,
        alive=alive,
        saturated=round(saturated),
        clipped=clipped / alive,
        wraps=_wraps(decoded, lanes, encoding.width),
        largest=largest / alive * step,
        norm=norm * step * sqrt(max(1, pipeline.size)),
        # No less than the mean norm (Jensen), which is told where its square is below the lane's resolution.
        rms=max(sqrt(energy) * encoding.levels, norm) * step,
        sum_rms=sqrt(decoded.energy) * step,
    )


def _wraps(decoded: Decoded, lanes: Vector, width: int) -> int:
    """By how many rounds of the ring the sum differs from what the devices say that they sent."""
    told = int(LANES.centre(lanes[:_WHOLE_LANES])[0])
    return int(abs(round((told - decoded.total) / 2**width)))


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

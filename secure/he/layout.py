"""An update as integers that can be added up encrypted, and their sum as the new model.

    grid    w / w_max * W for every value, in steps of its array that all devices take from the model that they hold
    steps   the exponents of these steps, so that who joins later can read the sum
    lanes   64-bit fixed point in several integers: the weight, what was cut off, exact arrays, the metrics

Devices send whole weights and not changes: so the sum is a model by itself, and a newcomer needs nothing else. The
integers have b bits; a lane is written in digits of base 2^b, from -2^(b-1) to 2^(b-1) - 1, which add up as the
number does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import frexp, isfinite

import numpy as np
from numpy.typing import NDArray

from propolis.secure.errors import PeerError, Refusal
from propolis.secure.he.messages import EncryptedPlan, Entry

Arrays = Mapping[str, NDArray[np.float64]]

# Fewer bits have no room for a step's exponent.
SMALLEST_VALUE_BITS = 8
_LANE_BITS, _LANE_STEP = 64, 2.0**-30
_HEAD_LANES = 2  # the weight, and how many values were cut off
# Weights may double in a round. Arrays that are small beside the model's largest value may grow to a 32nd of it.
_MARGIN, _SMALL_ARRAY = 2.0, 1 / 64
_LARGEST_EXPONENT = 100
# Of the largest weight; a mean over less is a division by what a lying device made of it.
_SMALLEST_SHARE = 2.0**-20


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """What a device has to say.

    Attributes:
        arrays: its whole weights by name, those of the plan.
        weight: in the unit of the application, mostly examples.
        metrics: by name, without the weight.
    """

    arrays: Arrays
    weight: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, repr=False)
class Opened:
    """What a sum says.

    Attributes:
        arrays: weighted means by name, in the plan's types.
        metrics: weighted means.
        weight: sum of the weights.
        saturated: values that were out of their range and were cut off, over all devices.
    """

    arrays: Mapping[str, NDArray[np.generic]]
    metrics: Mapping[str, float]
    weight: float
    saturated: int


class Layout:
    """Which integer is what.

    Args:
        plan: of the attempt.
        metrics: names of the metrics, in their order.
        clients: most devices of a sum.
        value_bits: b, bits of an integer, 8 to 32.
    """

    def __init__(self, plan: EncryptedPlan, metrics: Sequence[str], clients: int, value_bits: int) -> None:
        self._plan, self._metrics, self._clients, self._bits = plan, tuple(metrics), clients, value_bits
        self._coarse = [entry for entry in plan.entries if not entry.exact]
        self._exact = [entry for entry in plan.entries if entry.exact]
        self._digits = -(-_LANE_BITS // value_bits)
        self._grid = sum(entry.size for entry in self._coarse)
        self._lanes = _HEAD_LANES + sum(entry.size for entry in self._exact) + len(self._metrics)

    @property
    def count(self) -> int:
        """Number of integers."""
        return self._grid + len(self._coarse) + self._lanes * self._digits

    def encode(self, sample: Sample, model: Arrays, first: bool, rng: np.random.Generator) -> NDArray[np.int64]:
        """A device's integers.

        Args:
            sample: what it has to say.
            model: the global model that it trained, by which the steps are chosen.
            first: whether that is the public one that a run begins with.
            rng: for the rounding, which is unbiased.

        Returns:
            (count,) in [-2^(b-1), 2^(b-1)).

        Raises:
            PeerError: the weight is not positive and finite, or a value or metric is not finite.
        """
        share = self._share(sample.weight)
        exponents = step_exponents(model, self._coarse, self._bits, self._plan.range if first else 0.0)
        parts, saturated = [], int(sample.weight > self._plan.max_weight)
        for entry, exponent in zip(self._coarse, exponents, strict=True):
            integers, cut = self._rounded(_finite(sample.arrays[entry.name]) * share, exponent, rng)
            parts.append(integers)
            saturated += cut
        lanes = [_finite(sample.arrays[entry.name]) * share for entry in self._exact]
        lanes.append(_finite(np.array([sample.metrics[name] for name in self._metrics], np.float64)) * share)
        body = np.concatenate(lanes)
        bound = 2.0**32 / self._clients
        saturated += int(np.count_nonzero(np.abs(body) > bound))
        values = np.clip(np.concatenate([[share, float(saturated)], body]), -bound, bound)
        digits = self._to_digits(np.rint(values / _LANE_STEP).astype(np.int64))
        return np.concatenate([*parts, np.array(exponents, np.int64), digits])

    def decode(self, sums: NDArray[np.int64], alive: int) -> Opened:
        """What a sum says.

        Args:
            sums: (count,) of the devices' integers.
            alive: how many devices they are of.

        Raises:
            PeerError: they are no such sum: a device lies.
        """
        start = self._grid + len(self._coarse)
        exponents, rest = np.divmod(sums[self._grid : start], alive)
        lanes = self._from_digits(sums[start:])
        share, saturated = float(lanes[0]), float(lanes[1])
        if rest.any() or (np.abs(exponents) > _LARGEST_EXPONENT).any():
            raise PeerError(Refusal.CIPHERTEXT, "the devices of a sum did not take the same steps")
        if not alive * _SMALLEST_SHARE < share <= alive * (1 + 1e-6):
            raise PeerError(Refusal.CIPHERTEXT, f"the weights of {alive} devices add up to {share:g} of the largest")
        steps = np.repeat(np.ldexp(1.0, exponents), [entry.size for entry in self._coarse])
        fixed = self._lanes - len(self._metrics)
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found below
            arrays = _arrays(sums[: self._grid] * (steps / share), self._coarse)
            arrays |= _arrays(lanes[_HEAD_LANES:fixed] / share, self._exact)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise PeerError(Refusal.CIPHERTEXT, "a value of the mean is too large for its type")
        metrics = dict(zip(self._metrics, (float(lane) / share for lane in lanes[fixed:]), strict=True))
        return Opened(
            {entry.name: arrays[entry.name] for entry in self._plan.entries},
            metrics,
            share * self._plan.max_weight,
            max(0, round(saturated)),
        )

    def _share(self, weight: float) -> float:
        """The weight as a part of the largest one, as it travels in its lane."""
        if not (isfinite(weight) and weight > 0):
            raise PeerError(Refusal.WEIGHT, f"the weight must be positive and finite, got {weight:g}")
        # Cut and not refused: a refusal would tell the server whether the weight is above a bound of its choice.
        # Likewise a tiny one is raised to what no sum is refused for.
        share = min(max(weight / self._plan.max_weight, 2 * _SMALLEST_SHARE), 1.0)
        return round(share / _LANE_STEP) * _LANE_STEP

    def _rounded(
        self, values: NDArray[np.float64], exponent: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], int]:
        """Integers that are the values in steps of 2^exponent on average, and how many were out of range."""
        largest = float((1 << self._bits - 1) - 1)
        scaled = np.ldexp(values, -exponent)
        cut = int(np.count_nonzero(np.abs(scaled) > largest))
        lifted = np.floor(np.clip(scaled, -largest, largest) + rng.random(len(values)))
        return np.minimum(lifted, largest).astype(np.int64), cut

    def _to_digits(self, lanes: NDArray[np.int64]) -> NDArray[np.int64]:
        """(m,) numbers as (m * digits,), the lowest of each first."""
        half = 1 << self._bits - 1
        digits = np.empty((len(lanes), self._digits), np.int64)
        left = lanes.copy()
        for place in range(self._digits):
            digits[:, place] = (left + half & (1 << self._bits) - 1) - half
            left = left - digits[:, place] >> self._bits
        return digits.reshape(-1)

    def _from_digits(self, sums: NDArray[np.int64]) -> NDArray[np.float64]:
        """(m,) the sums of lanes as real numbers; each is below 2^63, so what wraps around on the way is right."""
        digits = sums.reshape(-1, self._digits).view(np.uint64)
        total = np.zeros(len(digits), np.uint64)
        for place in range(self._digits):
            total += digits[:, place] << np.uint64(place * self._bits)
        return total.view(np.int64).astype(np.float64) * _LANE_STEP


def step_exponents(model: Arrays, entries: Sequence[Entry], value_bits: int, least: float) -> list[int]:
    """For each array the exponent of the power of two that is its step: the same on all devices with this model.

    Args:
        model: the arrays by name.
        entries: those that go on a grid.
        value_bits: bits of an integer.
        least: smallest magnitude that there must be room for.
    """
    largest = [float(np.abs(model[entry.name]).max(initial=0.0)) for entry in entries]
    smallest = max(largest, default=0.0) * _SMALL_ARRAY
    exponents = []
    for magnitude in largest:
        room = max(_MARGIN * max(magnitude, smallest), least) or 1.0
        mantissa, exponent = frexp(room)
        exponent -= (mantissa == 0.5) + value_bits - 1
        exponents.append(min(max(exponent, -_LARGEST_EXPONENT), _LARGEST_EXPONENT))
    return exponents


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values as one row; raises PeerError where one is infinite or NaN."""
    if not np.isfinite(values).all():
        raise PeerError(Refusal.NOT_FINITE, "the update or a metric is infinite or NaN")
    return np.asarray(values, np.float64).reshape(-1)


def _arrays(flat: NDArray[np.float64], entries: Sequence[Entry]) -> dict[str, NDArray[np.generic]]:
    """The entries' arrays, in their types: integers rounded to the nearest, flags set from one half on."""
    found: dict[str, NDArray[np.generic]] = {}
    start = 0
    for entry in entries:
        values = flat[start : start + entry.size].reshape(entry.shape)
        start += entry.size
        kind = np.dtype(entry.dtype)
        if kind.kind == "b":
            found[entry.name] = np.asarray(values >= 0.5)
            continue
        if kind.kind in "iu":
            values = np.clip(np.rint(values), np.iinfo(kind).min, np.iinfo(kind).max)
        found[entry.name] = np.asarray(values, kind)
    return found

"""The public scale from round to round, and the grid that follows from it.

Nobody sees a single update, so what a round needs to know of their size comes from sums of the rounds before. One
lying device can move the scale, but no further than by a factor of two a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Self

from propolis.secure.codec.encoding import LARGEST_NORM, Encoding, Shapes
from propolis.secure.codec.profiles import CORRELATED, Profile
from propolis.secure.codec.quantize import wrap_free
from propolis.secure.codec.rotate import padded_size
from propolis.secure.codec.update import Mean
from propolis.secure.codec.wraps import choose_grid, rounding_noise

# The range of the next round, in units of the mean of the devices' largest magnitudes.
_HEADROOM = 4.0
_SMALLEST, _LARGEST = 1e-12, 1e12
# Bits of a first round, of whose updates only a range is known.
COLD_START_BITS = 16
# Another round has other devices: a peak is remembered, falls slowly, and something is to spare above it.
_HELD_RMS, _HELD_CORRELATION, _SPARE = 0.95, 0.9, 1.1
# By how much the correlation that was seen is exceeded.
_CORRELATION_MARGIN = (1.5, 0.02)

_METRIC = "scale-"


@dataclass(frozen=True, slots=True)
class Scale:
    """What is known of the size of the devices' weighted changes.

    Attributes:
        range: largest magnitude of one coordinate that is made room for, where nothing is rotated.
        norm: mean L2 norm of a change; 0 before the first round.
        rms: root mean square of a device's coordinates that travel, as it was at its latest peak; 0 before the
            first round.
        correlation: between the coordinates of two devices, in [0, 1].
    """

    range: float
    norm: float = 0.0
    rms: float = 0.0
    correlation: float = CORRELATED

    def following(self, mean: Mean, encoding: Encoding) -> Scale:
        """The scale after a round."""
        return Scale(
            range=within_twice(self.range, _HEADROOM * mean.largest),
            norm=within_twice(self.norm, mean.norm) if mean.norm > 0 else self.norm,
            rms=within_twice(self.rms, max(mean.rms, _HELD_RMS * self.rms)) if mean.rms > 0 else self.rms,
            correlation=self._following_correlation(mean, encoding),
        )

    def _following_correlation(self, mean: Mean, encoding: Encoding) -> float:
        seen = _correlation(mean, encoding)
        if seen is None:
            return self.correlation
        if self.rms <= 0:  # nothing was seen before
            return seen
        return min(max(seen, _HELD_CORRELATION * self.correlation), 2 * self.correlation + _CORRELATION_MARGIN[1], 1.0)

    def metrics(self) -> dict[str, float]:
        """As metrics of a round, so that a run can be resumed."""
        return {f"{_METRIC}{each.name}": getattr(self, each.name) for each in fields(self)}

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, float]) -> Self:
        """The scale that `metrics` wrote down."""
        return cls(**{each.name: metrics[f"{_METRIC}{each.name}"] for each in fields(cls)})


def within_twice(before: float, seen: float) -> float:
    """What was seen, but no further from what was before than a factor of two; anything goes after zero.

    >>> within_twice(1.0, 0.8), within_twice(1.0, 100.0), within_twice(1.0, 0.0)
    (0.8, 2.0, 0.5)
    """
    wanted = seen if before <= 0 else min(max(seen, before / 2), before * 2)
    return min(max(wanted, _SMALLEST), _LARGEST)


def scaled(encoding: Encoding, profile: Profile, scale: Scale, devices: int, shapes: Shapes) -> Encoding:
    """The encoding with the grid and the clip that the scale asks for.

    Args:
        encoding: whose grid is to be chosen.
        profile: of the run.
        scale: after the rounds so far.
        devices: in the cohort.
        shapes: of the arrays by name.

    Returns:
        It with the profile's width, or a wider one where the devices turned out so much alike that their sum would
        not fit.

    Raises:
        UsageError: the ring of a first round is too small for so many devices.
    """
    if not profile.rotated or scale.rms <= _SMALLEST:
        width = max(profile.width, COLD_START_BITS) if profile.rotated else profile.width
        safe = wrap_free(width, devices, scale.range)
        return replace(encoding, width=width, step=safe.step, levels=safe.levels, clip=LARGEST_NORM)
    count = expected_size(encoding, shapes)
    width, grid = choose_grid(count, devices, profile.width, scale.correlation, profile.wraps)
    clip = min(profile.clip * scale.norm, LARGEST_NORM)
    step = _SPARE * scale.rms * grid
    return replace(encoding, width=width, step=step, levels=2 ** (width - 1) - 1, clip=clip)


def expected_size(encoding: Encoding, shapes: Shapes) -> int:
    """How many coordinates travel, where nothing is pruned."""
    sizes = [prod(shapes[name]) for name in encoding.quantized]
    whole = sum(size for size in sizes if size <= encoding.keep)
    return max(1, padded_size(whole + round(encoding.density * (sum(sizes) - whole))))


def _correlation(mean: Mean, encoding: Encoding) -> float | None:
    """From the sum's energy against the devices': E|sum|^2 = n E|x|^2 (1 + (n - 1) r), and more than that."""
    if mean.alive < 2 or mean.rms <= 0:
        return None
    noise = rounding_noise(mean.alive, encoding.step / mean.rms) * encoding.step**2
    ratio = max(0.0, mean.sum_rms**2 - noise) / (mean.alive * mean.rms**2)
    factor, more = _CORRELATION_MARGIN
    return min(1.0, max(0.0, factor * (ratio - 1) / (mean.alive - 1)) + more)

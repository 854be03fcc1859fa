"""How updates become vectors that can be added up: the public terms that all devices of a round agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from propolis.secure.codec.quantize import LARGEST_LEVELS, Grid
from propolis.secure.errors import UsageError
from propolis.secure.wire import between, sized

SEED_BYTES = 32
LARGEST_NORM = 1e30
_SMALLEST_STEP, _LARGEST_STEP = 1e-24, 1e15

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """Part of a round's plan; each field belongs to the stage of its name in `propolis.secure.codec`.

    Attributes:
        width: bits of the ring, which is what a coordinate costs on the wire.
        step: distance between two neighbours on the grid, in units of a weighted change.
        levels: largest integer that one device sends for a coordinate; what exceeds it is cut off and counted.
        max_weight: weights are taken relative to this public maximum; larger ones are cut to it and counted.
        weight_key: the metric that is the weight.
        quantized: names of the arrays that travel on the grid of the ring, sorted.
        exact: names of the arrays that travel as lanes, sorted.
        clip: largest L2 norm of a device's weighted change; a longer one is scaled down and counted.
        rotated: whether the vector is rotated before it is rounded.
        density: share of the coordinates that is sent; which ones follows from `seed`.
        keep: arrays of at most this many entries are always sent whole.
        pruned: whether the entries that are exactly zero in the model's matrices are left out.
        seed: 32 bytes that support, rotation and strata are drawn from; the same in every attempt at a round.
    """

    width: int = between(2, 32)
    step: float = between(_SMALLEST_STEP, _LARGEST_STEP)
    levels: int = between(1, LARGEST_LEVELS)
    max_weight: float = between(1e-9, 1e18)
    weight_key: str = sized(1, 200)
    quantized: tuple[str, ...] = sized(1, 1000, count=2**16)
    exact: tuple[str, ...] = sized(1, 1000, count=2**16)
    clip: float = between(1e-30, LARGEST_NORM, default=LARGEST_NORM)
    rotated: bool = False
    density: float = between(1e-6, 1.0, default=1.0)
    keep: int = between(0, 2**31, default=0)
    pruned: bool = False
    seed: bytes = sized(SEED_BYTES, default=bytes(SEED_BYTES))

    @property
    def grid(self) -> Grid:
        """Where the vector's coordinates lie."""
        return Grid(self.width, self.step, self.levels)

    def dimension(self, shapes: Shapes) -> int:
        """Number of entries of the quantized arrays, for arrays of these shapes."""
        return sum(prod(shapes[name]) for name in self.quantized)

    def require_names(self, *, trains: bool) -> None:
        """Refuse lists of arrays that are not sorted, name one twice, or name any where nothing is trained.

        Raises:
            UsageError: they are such.
        """
        names = [*self.quantized, *self.exact]
        if list(self.quantized) != sorted(self.quantized) or list(self.exact) != sorted(self.exact):
            raise UsageError("the names of the arrays are not sorted")
        if len(set(names)) < len(names):
            raise UsageError("an array is named twice")
        if names and not trains:
            raise UsageError("a round to evaluate sends back no arrays")

    def require_room(self, devices: int) -> None:
        """Refuse a grid on which the sum of so many devices is bound to leave the ring.

        Without rotation nothing is known of a coordinate, so no wrap may be possible at all; with it, wraps are so
        rare as the width was chosen for (`propolis.secure.codec.wraps`), and a single device can cause none.

        Raises:
            UsageError: the ring is too small.
        """
        if self.grid.is_wrap_free(devices) or (self.rotated and self.levels < 2 ** (self.width - 1)):
            return
        raise UsageError(f"a ring of {self.width} bits is too small for {devices} devices at {self.levels} levels")

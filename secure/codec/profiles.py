"""Named sets of the codec's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

from propolis.secure.codec.quantize import wrap_free
from propolis.secure.codec.wraps import ALLOWED_WRAPS, choose_grid
from propolis.secure.errors import UsageError

_WIDEST = 32
# The correlation between two devices that is made room for before any was seen.
CORRELATED = 0.2


@dataclass(frozen=True, slots=True)
class Profile:
    """How updates and models are encoded in a run.

    Attributes:
        width: bits of the ring: what a coordinate costs on the wire.
        rotated: rotate before rounding, and choose the grid by the norms of earlier rounds. Without, the grid follows
            the largest coordinates and no sum can leave the ring.
        density: share of the coordinates that travels in a round.
        keep: arrays of at most this many entries always travel whole.
        clip: largest L2 norm of a weighted change, in units of the devices' mean.
        wraps: coordinates of a round's sum that may be expected to leave the ring.
        broadcast: step of the model's way to the devices, in units of the root mean square of what they lack. 0 sends
            the whole model.
    """

    width: int = 16
    rotated: bool = False
    density: float = 1.0
    keep: int = 0
    clip: float = 5.0
    wraps: float = ALLOWED_WRAPS
    broadcast: float = 0.0

    def __post_init__(self) -> None:
        if not (2 <= self.width <= _WIDEST and 0 < self.density <= 1 and self.keep >= 0):
            raise UsageError(
                f"a codec needs 2 to 32 bits, a density in (0, 1] and keep >= 0, got {self.width}, {self.density} and "
                f"{self.keep}"
            )
        if not (0 < self.clip < inf and 0 < self.wraps <= 1 and 0 <= self.broadcast <= 100):
            raise UsageError("a codec needs clip > 0, wraps in (0, 1] and a broadcast step in 0..100")

    def require_room(self, devices: int, parameters: int) -> None:
        """Refuse a ring that is too small for the sum of so many devices, before anything is trained.

        Raises:
            UsageError: it is; the message says how many bits do.
        """
        if not self.rotated:
            wrap_free(self.width, devices, 1.0)
            return
        enough, _ = choose_grid(max(1, parameters), devices, self.width, CORRELATED, self.wraps)
        if enough > self.width:
            raise UsageError(f"a ring of {self.width} bits is too small for the sum of {devices} devices: use {enough}")


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "float32": Profile(),
        "dense": Profile(width=4, rotated=True, broadcast=1.0),
        "thin": Profile(width=5, rotated=True, density=0.1, keep=2048, broadcast=3.3),
    }
)

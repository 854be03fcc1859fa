"""Which sums over a model have been published: two of nearly the same devices tell of who is in one of them only."""

from __future__ import annotations

from collections.abc import Iterable

from propolis.secure.errors import TooFewPeersError
from propolis.secure.secagg.plan import Kind

_MODELS_REMEMBERED = 256


class PublishedSums:
    """Those of this process, over the last models.

    Args:
        min_difference: fewest devices that two sums over one model may differ by, if they do at all.
    """

    def __init__(self, min_difference: int) -> None:
        self._min_difference = min_difference
        self._sums: dict[tuple[Kind, bytes], list[frozenset[int]]] = {}

    def require_apart(self, kind: Kind, model: bytes, alive: Iterable[int]) -> None:
        """Against differencing: two sums over one model are over the same devices, or differ by enough of them.

        Args:
            kind: of the round.
            model: its digest.
            alive: indices of the devices in the sum.

        Raises:
            TooFewPeersError: this sum would tell too much.
        """
        for before in self._sums.get((kind, model), []):
            if 0 < len(before.symmetric_difference(alive)) < self._min_difference:
                raise TooFewPeersError(
                    f"the devices of this round and of one before over the same model differ by fewer than "
                    f"{self._min_difference}: their sums would tell too much"
                )

    def remember(self, kind: Kind, model: bytes, alive: Iterable[int]) -> None:
        """Note that a sum has been published."""
        self._sums.setdefault((kind, model), []).append(frozenset(alive))
        while len(self._sums) > _MODELS_REMEMBERED:
            del self._sums[next(iter(self._sums))]

"""How often one device may ask: whoever asks again and again costs the others nothing but a look here."""

from __future__ import annotations

import time
from collections import deque


class Patience:
    """Counts what devices ask, by their index.

    Args:
        most: times that each may ask.
        seconds: in any time as long as this.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds = most, seconds
        self._asked: dict[int, deque[float]] = {}

    def ends(self, index: int) -> bool:
        """Whether this device has asked as often as it may; where it has not, it has now asked once more."""
        now, recent = time.monotonic(), self._asked.setdefault(index, deque(maxlen=self.most))
        if len(recent) == self.most and now - recent[0] < self.seconds:
            return True
        recent.append(now)
        return False
